-- The whole database: events and four ways into them; meters and features. Times are integer microseconds since 1970, UTC.
-- Run as one script inside a transaction, so a crash half-way leaves an empty file, not half a schema.
-- Every statement is safe to run again: two processes may open a new file at the same moment.

-- An environment's name is kept once; an event and each of its index entries hold a number of one byte or none.
CREATE TABLE IF NOT EXISTS environments (
    id   INTEGER PRIMARY KEY,
    name TEXT    NOT NULL UNIQUE
) STRICT;

CREATE TABLE IF NOT EXISTS events (
    seq                  INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of arrival; a number is never used twice
    environment          INTEGER NOT NULL,  -- the environment of the key that sent it
    id                   TEXT    NOT NULL,  -- the idempotency key
    external_customer_id TEXT    NOT NULL,
    customer_id          TEXT    NOT NULL,  -- '' when absent, like source
    event_name           TEXT    NOT NULL,
    source               TEXT    NOT NULL,
    timestamp_us         INTEGER NOT NULL,  -- when it happened
    ingested_at_us       INTEGER NOT NULL,  -- when it was stored here
    properties           TEXT    NOT NULL   -- the JSON object as it was sent: numbers keep their digits
) STRICT;

-- What makes a retry harmless: the first event with an id stays.
CREATE UNIQUE INDEX IF NOT EXISTS events_by_id ON events (environment, id);

-- The order of a page, and so the cursor's: (timestamp, id) within one environment.
CREATE INDEX IF NOT EXISTS events_by_time ON events (environment, timestamp_us, id);

-- The same order for one customer's events.
CREATE INDEX IF NOT EXISTS events_by_customer ON events (environment, external_customer_id, timestamp_us, id);

-- The order of sort=event_name, and the way to a rare event's rows. It costs 75 bytes an event and
-- ingest 0-15 % (there are few names, so their pages stay hot); without it each page sorts the whole range.
CREATE INDEX IF NOT EXISTS events_by_name ON events (environment, event_name, timestamp_us, id);

-- A saved aggregation over the events of one name. Nothing is removed: what is archived still counts what came before.
CREATE TABLE IF NOT EXISTS meters (
    environment    INTEGER NOT NULL,
    id             TEXT    NOT NULL,
    name           TEXT    NOT NULL,
    event_name     TEXT    NOT NULL,
    aggregation    TEXT    NOT NULL,  -- JSON, as it is answered, like the next
    filters        TEXT    NOT NULL,
    reset_usage    TEXT    NOT NULL,
    created_at_us  INTEGER NOT NULL,
    updated_at_us  INTEGER NOT NULL,
    archived_at_us INTEGER,           -- NULL: published
    PRIMARY KEY (environment, id)
) STRICT, WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS meters_by_event_name ON meters (environment, event_name);

-- What a meter is called, and its units.
CREATE TABLE IF NOT EXISTS features (
    environment    INTEGER NOT NULL,
    id             TEXT    NOT NULL,
    name           TEXT    NOT NULL,
    lookup_key     TEXT    NOT NULL,
    description    TEXT    NOT NULL,
    meter_id       TEXT    NOT NULL,  -- '' without one
    metadata       TEXT    NOT NULL,  -- JSON
    type           TEXT    NOT NULL,
    unit_singular  TEXT    NOT NULL,
    unit_plural    TEXT    NOT NULL,
    reporting_unit TEXT    NOT NULL,  -- JSON, null without one
    created_at_us  INTEGER NOT NULL,
    updated_at_us  INTEGER NOT NULL,
    archived_at_us INTEGER,
    PRIMARY KEY (environment, id)
) STRICT, WITHOUT ROWID;

-- Of two features with one key the second is refused: by this index, so that it is so for two at once, too.
CREATE UNIQUE INDEX IF NOT EXISTS features_by_lookup_key ON features (environment, lookup_key)
    WHERE archived_at_us IS NULL AND lookup_key <> '';

CREATE INDEX IF NOT EXISTS features_by_meter ON features (environment, meter_id);

-- For people: sqlite3 events.db "SELECT * FROM readable_events ORDER BY seq DESC LIMIT 10". The seconds are counted
-- from the year 1, so that no division is of a negative.
CREATE VIEW IF NOT EXISTS readable_events AS
SELECT
    seq,
    environments.name AS environment,
    events.id AS id,
    external_customer_id,
    customer_id,
    event_name,
    source,
    strftime('%Y-%m-%dT%H:%M:%S', (timestamp_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch')
        || printf('.%06dZ', (timestamp_us + 62135596800000000) % 1000000) AS timestamp,
    strftime('%Y-%m-%dT%H:%M:%S', (ingested_at_us + 62135596800000000) / 1000000 - 62135596800, 'unixepoch')
        || printf('.%06dZ', (ingested_at_us + 62135596800000000) % 1000000) AS ingested_at,
    properties
FROM events JOIN environments ON environments.id = events.environment;

PRAGMA application_id = 0x45565354;  -- 'EVST': somebody else's database is not taken for ours
PRAGMA user_version = 1;             -- raised with every change of this file, once there was a release
