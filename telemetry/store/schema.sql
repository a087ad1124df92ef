-- id is the Seq of the record, which is also about when it was received, in microseconds since 1970.
CREATE TABLE flows (
  id       INTEGER PRIMARY KEY,
  time     INTEGER NOT NULL, -- when it began, in nanoseconds since 1970
  verdict  TEXT NOT NULL,
  endpoint TEXT NOT NULL,
  caller   TEXT NOT NULL,
  trace_id TEXT NOT NULL,
  record   TEXT NOT NULL     -- the whole flow as JSON
) STRICT;
CREATE INDEX flows_found ON flows (time, verdict, endpoint, caller, trace_id); -- answers filters without the rows
CREATE INDEX flows_traced ON flows (trace_id);

CREATE TABLE gateway_spans (
  id       INTEGER PRIMARY KEY,
  trace_id TEXT NOT NULL,
  record   TEXT NOT NULL
) STRICT;
CREATE INDEX gateway_spans_traced ON gateway_spans (trace_id);

CREATE TABLE application_spans (
  id       INTEGER PRIMARY KEY,
  trace_id TEXT NOT NULL,
  record   TEXT NOT NULL
) STRICT;
CREATE INDEX application_spans_traced ON application_spans (trace_id);

-- How much of the store each table has, kept by every write and every pruning.
CREATE TABLE held (
  kind  INTEGER PRIMARY KEY, -- 0 flows, 1 gateway_spans, 2 application_spans
  rows  INTEGER NOT NULL,
  bytes INTEGER NOT NULL     -- of records
) STRICT;
INSERT INTO held VALUES (0, 0, 0), (1, 0, 0), (2, 0, 0)
