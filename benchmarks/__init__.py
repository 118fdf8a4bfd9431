"""How fast eventstore is, compared with the least that the same machine needs for the same work.

    python -m benchmarks          # one table, in six to ten minutes (--quick: seconds; --full: up to 10,000,000 events)
    python -m benchmarks soak     # ten minutes of mixed load: do memory, file, WAL, handles and latencies stay flat?
    python -m benchmarks peers    # the same events in Datasette and PocketBase, in two minutes; needs a network for pip

The table compares each figure with a floor: raw `sqlite3` with the server's pragmas and schema, or a Starlette route in
uvicorn that does nothing but send the same bytes. Both use the same file and alternate in one run (floor, ours, floor,
ours, ...). Figures are medians of the rounds. The ratio is our cost divided by the floor's: 1.0 is as good as the
floor, 2.0 takes twice the time or space. Ratios apply to other machines as well, absolute figures do not.

The servers are real processes on a file in a temporary folder (`--dir` chooses the disk). So are the load generators:
asyncio on uvloop, one process for each kind of load. On the same requests and connections, wrk gets between 3 % fewer
and 8 % more answers a second than they do (medians of five alternating runs on two cores): within the noise of both.
"""
