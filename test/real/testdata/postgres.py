"""What an application does with Postgres. Called with what to do and a connection string of libpq."""

import hashlib
import sys
import threading

import psycopg


def vectors(dsn):
    """Makes a collection with pgvector, and prints who is nearest."""
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute("create extension if not exists vector")
        db.execute("drop table if exists docs")
        db.execute("create table docs (name text, at vector(3))")
        with db.cursor() as cursor:
            cursor.executemany("insert into docs values (%s, %s)",
                               [("far", "[9,9,9]"), ("near", "[1,1,2]"), ("nearer", "[1,1,1.5]"), ("away", "[-5,0,0]")])
        db.execute("create index on docs using hnsw (at vector_l2_ops)")
        print(*(name for (name,) in db.execute("select name from docs order by at <-> '[1,1,1]' limit 2")))


def copies(dsn):
    """Two at once: copies 12 MB in and out, and prints whether they are the same."""
    same = []

    def copy(table):
        sent, got = hashlib.sha256(), hashlib.sha256()
        with psycopg.connect(dsn, autocommit=True) as db:
            db.execute(f"create temporary table {table} (n int, line text)")
            with db.cursor().copy(f"copy {table} from stdin") as into:
                for n in range(12_000):
                    row = f"{n}\t{hashlib.sha512(b'%d' % n).hexdigest() * 8}\n".encode()
                    sent.update(row)
                    into.write(row)
            with db.cursor().copy(f"copy (select * from {table} order by n) to stdout") as out:
                for block in out:
                    got.update(block)
        same.append(sent.digest() == got.digest())

    threads = [threading.Thread(target=copy, args=(table,)) for table in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(*same)


def ask(dsn):
    """One question."""
    with psycopg.connect(dsn) as db:
        print(*db.execute("select 1").fetchone())


{"vectors": vectors, "copies": copies, "ask": ask}[sys.argv[1]](sys.argv[2])
