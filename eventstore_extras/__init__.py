"""What grew around the service: events in and out, a mock for tests. eventstore.py works without it."""
