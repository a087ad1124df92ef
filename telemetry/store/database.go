package store

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// schema makes the tables. Filters read its columns; all else of a record is in its JSON, so that a new field needs no
// new schema.
//
//go:embed schema.sql
var schema string

const (
	schemaVersion = 1
	pageSize      = 4096
	asideSuffix   = ".broken"
)

var (
	errOtherVersion = errors.New("the file was made by another version")
	errUnreadable   = errors.New("read telemetry record")
)

// tables names the table of each kind; shares say what part of the file it may always have.
var (
	tables = [kinds]string{flows: "flows", gatewaySpans: "gateway_spans", applicationSpans: "application_spans"}
	shares = [kinds]int64{flows: 2, gatewaySpans: 1, applicationSpans: 1}
)

// database is an open file: one connection that writes, and some that read.
type database struct {
	writer, reader *sql.DB
	maxPages       int64
	lastSeq        int64 // in the file when it was opened
}

// openDatabase opens the file, or makes it, readable by its owner only.
func openDatabase(ctx context.Context, path string, maxBytes int64) (*database, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open telemetry store: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open telemetry store: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) // SQLite gives its other files the same mode
	if err == nil {
		err = errors.Join(f.Chmod(0o600), f.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("open telemetry store: %w", err)
	}
	d := &database{maxPages: maxBytes / pageSize}
	d.writer, err = connect(path, "auto_vacuum(2)", "journal_mode(WAL)", "synchronous(NORMAL)", "journal_size_limit(4194304)",
		fmt.Sprintf("max_page_count(%d)", d.maxPages))
	if err != nil {
		return nil, err
	}
	d.writer.SetMaxOpenConns(1)
	d.reader, err = connect(path, "query_only(1)")
	if err != nil {
		return nil, errors.Join(err, d.writer.Close())
	}
	d.reader.SetMaxOpenConns(4)
	if err = d.prepare(ctx); err == nil {
		err = d.readLastSeq(ctx)
	}
	if err != nil {
		d.close()
		return nil, fmt.Errorf("open telemetry store: %w", err)
	}
	return d, nil
}

func connect(path string, pragmas ...string) (*sql.DB, error) {
	query := url.Values{"_pragma": append([]string{"busy_timeout(2000)", fmt.Sprintf("page_size(%d)", pageSize)}, pragmas...)}
	dsn := url.URL{Scheme: "file", Path: path, RawQuery: query.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, fmt.Errorf("open telemetry store: %w", err)
	}
	return db, nil
}

// prepare makes the tables of an empty file.
func (d *database) prepare(ctx context.Context) error {
	var version int
	if err := d.writer.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	switch version {
	case schemaVersion:
		return nil
	case 0:
		_, err := d.writer.ExecContext(ctx, fmt.Sprintf("BEGIN; %s; PRAGMA user_version = %d; COMMIT", schema, schemaVersion))
		return err
	}
	return fmt.Errorf("%w: %d, and this one writes %d", errOtherVersion, version, schemaVersion)
}

func (d *database) readLastSeq(ctx context.Context) error {
	for _, table := range tables {
		var n int64
		if err := d.reader.QueryRowContext(ctx, "SELECT coalesce(max(id), 0) FROM "+table).Scan(&n); err != nil {
			return err
		}
		d.lastSeq = max(d.lastSeq, n)
	}
	return nil
}

func (d *database) close() {
	_ = d.reader.Close() // nothing to lose
	_ = d.writer.Close() // what was committed is in the write-ahead log
}

// parts are what SQLite adds to the name of a file, for all that belongs to it.
var parts = [...]string{"", "-wal", "-shm"}

// putAside moves the file and what belongs to it away, by a name that is not taken: ".broken", ".broken.1" and so on.
func putAside(path string) (aside string, err error) {
	aside = path + asideSuffix
	for n := 1; taken(aside); n++ {
		aside = fmt.Sprintf("%s%s.%d", path, asideSuffix, n)
	}
	for _, part := range parts {
		if e := os.Rename(path+part, aside+part); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return aside, err
}

func taken(path string) bool {
	for _, part := range parts {
		if _, err := os.Lstat(path + part); err == nil {
			return true
		}
	}
	return false
}

// isBroken reports whether the file is no database of ours, or no longer one.
func isBroken(err error) bool {
	switch code(err) {
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return true
	}
	return errors.Is(err, errOtherVersion) || errors.Is(err, errUnreadable)
}

// isFull reports whether there was no room: on the disk, or below our own bound.
func isFull(err error) bool { return code(err) == sqlite3.SQLITE_FULL }

// code returns the primary result code of SQLite; 0: it is not from SQLite.
func code(err error) int {
	var e *sqlite.Error
	if errors.As(err, &e) {
		return e.Code() & 0xff
	}
	return 0
}
