-- The whole schema: environments, events with four indexes, meters and features. Times are integer microseconds since
-- 1970, UTC. The server runs this file in one transaction: after a crash half-way the database file is still empty.
-- Every statement is safe to repeat, because two processes may open a new file at the same moment.

-- Names of environments. Events and index entries hold the short id instead of the name.
CREATE TABLE IF NOT EXISTS environments (
    id   INTEGER PRIMARY KEY,
    name TEXT    NOT NULL UNIQUE
) STRICT;

CREATE TABLE IF NOT EXISTS events (
    seq                  INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival; AUTOINCREMENT never reuses a number
    environment          INTEGER NOT NULL,  -- environments.id, from the API key of the request
    id                   TEXT    NOT NULL,  -- idempotency key: unique in the environment
    external_customer_id TEXT    NOT NULL,
    customer_id          TEXT    NOT NULL,  -- '' if the client sent none; the same for source
    event_name           TEXT    NOT NULL,
    source               TEXT    NOT NULL,
    timestamp_us         INTEGER NOT NULL,  -- when the event happened
    ingested_at_us       INTEGER NOT NULL,  -- when this server accepted it
    properties           TEXT    NOT NULL   -- JSON object; numbers keep the digits that the client sent
) STRICT;

-- Finds an event by its id, and rejects a second event with the same id. Without it a retry would store duplicates.
CREATE UNIQUE INDEX IF NOT EXISTS events_by_id ON events (environment, id);

-- Holds an environment's events in the order of pages and cursors: (timestamp, id). Without it each page would sort all
-- events of the range. The id keeps pages fast if a backfill gives all events of a day the same time.
CREATE INDEX IF NOT EXISTS events_by_time ON events (environment, timestamp_us, id);

-- Holds each customer's events by time. Without it a customer's page would scan the events of all customers. The id is
-- left out of this index and the next one; with it the file would be a fifth larger and bulk ingest 0.8 times as fast.
-- SQLite sorts the events that share a microsecond: a page among 5,000 such events takes 4 ms longer.
CREATE INDEX IF NOT EXISTS events_by_customer ON events (environment, external_customer_id, timestamp_us);

-- Holds the events in the order of sort=event_name, and finds the events with a rare name. Without it a page in that
-- order would sort the whole range. Inserts touch few of its pages, because there are few names.
CREATE INDEX IF NOT EXISTS events_by_name ON events (environment, event_name, timestamp_us);

-- Meters: saved aggregations over the events with one name. Rows are never deleted, because the usage of an archived
-- meter can still be queried.
CREATE TABLE IF NOT EXISTS meters (
    environment    INTEGER NOT NULL,
    id             TEXT    NOT NULL,
    name           TEXT    NOT NULL,
    event_name     TEXT    NOT NULL,
    aggregation    TEXT    NOT NULL,  -- JSON, as the API returns it; the same for filters and reset_usage
    filters        TEXT    NOT NULL,
    reset_usage    TEXT    NOT NULL,
    created_at_us  INTEGER NOT NULL,
    updated_at_us  INTEGER NOT NULL,
    archived_at_us INTEGER,           -- NULL if the meter is published
    PRIMARY KEY (environment, id)
) STRICT, WITHOUT ROWID;

-- Finds the meters that aggregate events of a name. Without it the query would scan all meters of the environment.
CREATE INDEX IF NOT EXISTS meters_by_event_name ON meters (environment, event_name);

-- Features: the name that users see for a meter, and its units.
CREATE TABLE IF NOT EXISTS features (
    environment    INTEGER NOT NULL,
    id             TEXT    NOT NULL,
    name           TEXT    NOT NULL,
    lookup_key     TEXT    NOT NULL,
    description    TEXT    NOT NULL,
    meter_id       TEXT    NOT NULL,  -- '' without a meter
    metadata       TEXT    NOT NULL,  -- JSON
    type           TEXT    NOT NULL,
    unit_singular  TEXT    NOT NULL,
    unit_plural    TEXT    NOT NULL,
    reporting_unit TEXT    NOT NULL,  -- JSON; null without one
    created_at_us  INTEGER NOT NULL,
    updated_at_us  INTEGER NOT NULL,
    archived_at_us INTEGER,
    PRIMARY KEY (environment, id)
) STRICT, WITHOUT ROWID;

-- Rejects a second published feature with the same lookup key. Without it two simultaneous requests could succeed.
CREATE UNIQUE INDEX IF NOT EXISTS features_by_lookup_key ON features (environment, lookup_key)
    WHERE archived_at_us IS NULL AND lookup_key <> '';

-- Finds the features of a meter. Without it the query would scan all features of the environment.
CREATE INDEX IF NOT EXISTS features_by_meter ON features (environment, meter_id);

-- Shows events with the environment's name and readable times, for the sqlite3 command line:
--     sqlite3 events.db "SELECT * FROM readable_events ORDER BY seq DESC LIMIT 10"
-- Offset to year 1: integer division truncates toward zero and would round times before 1970 up.
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

PRAGMA application_id = 0x45565354;  -- 'EVST'; the server refuses another program's database
PRAGMA user_version = 2;             -- format of the tables; a change needs a step in eventstore_extras/upgrades.py
