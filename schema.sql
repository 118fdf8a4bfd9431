-- The whole database: one table, four ways into it. Times are integer microseconds since 1970, UTC.
-- Run as one script inside a transaction, so a crash half-way leaves an empty file, not half a schema.
-- Every statement is safe to run again: two processes may open a new file at the same moment.

CREATE TABLE IF NOT EXISTS events (
    environment          TEXT    NOT NULL,  -- the environment of the key that sent it
    id                   TEXT    NOT NULL,  -- the idempotency key
    external_customer_id TEXT    NOT NULL,
    customer_id          TEXT    NOT NULL,  -- '' when absent, like source
    event_name           TEXT    NOT NULL,
    source               TEXT    NOT NULL,
    timestamp_us         INTEGER NOT NULL,  -- when it happened
    ingested_at_us       INTEGER NOT NULL,  -- when it was stored here
    properties           TEXT    NOT NULL,  -- the JSON object as it was sent: numbers keep their digits

    -- The event as it is answered, but for its environment and properties: its JSON is made once, here, and not at
    -- every read. A page comes 1.4 times as often; for that an event takes 800 bytes of disk instead of 530, and a batch
    -- a tenth longer. Times are written as Go writes them, counted from the year 1 so that no division is of a negative.
    head TEXT NOT NULL GENERATED ALWAYS AS (rtrim(json_object(
        'id', id,
        'external_customer_id', external_customer_id,
        'customer_id', customer_id,
        'event_name', event_name,
        'source', source,
        'timestamp', rtrim(rtrim(
            strftime('%Y-%m-%dT%H:%M:%S', (timestamp_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch')
            || '.' || substr(1000000 + (timestamp_us + 62135596800000000) % 1000000, 2), '0'), '.') || 'Z',
        'ingested_at', rtrim(rtrim(
            strftime('%Y-%m-%dT%H:%M:%S', (ingested_at_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch')
            || '.' || substr(1000000 + (ingested_at_us + 62135596800000000) % 1000000, 2), '0'), '.') || 'Z'
    ), '}') || ',"properties":') STORED
) STRICT;

-- What makes a retry harmless: the first event with an id stays.
CREATE UNIQUE INDEX IF NOT EXISTS events_by_id ON events (environment, id);

-- The order of a page, and so the cursor's: (timestamp, id) within one environment.
CREATE INDEX IF NOT EXISTS events_by_time ON events (environment, timestamp_us, id);

-- The same order for one customer's events.
CREATE INDEX IF NOT EXISTS events_by_customer ON events (environment, external_customer_id, timestamp_us, id);

-- The order of sort=event_name, and the way to a rare event's rows. It costs 80 bytes an event and
-- ingest 0-15 % (there are few names, so their pages stay hot); without it each page sorts the whole range.
CREATE INDEX IF NOT EXISTS events_by_name ON events (environment, event_name, timestamp_us, id);

PRAGMA application_id = 0x45565354;  -- 'EVST': somebody else's database is not taken for ours
PRAGMA user_version = 2;             -- raised with every change of this file
