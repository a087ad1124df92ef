"""curator keeps the collections: it creates `handbook`, which indexer fills, and `payroll`, which nobody else may read."""
import random
import sys

from attempts import Attempts, emit
from gateway import Gateway

DIMENSIONS = 576  # of SmolLM2's embeddings
PAYROLL = {  # made up
    "emp-001": "Ada Quill, archivist, 4,120 a month",
    "emp-002": "Bo Lantern, night watch, 3,870 a month",
    "emp-003": "Cy Drawbridge, engineer, 5,010 a month",
}


def main():
    gateway = Gateway("curator")
    attempt = Attempts(gateway)
    docs = gateway.docs()
    collections = {}

    def create(name):
        collections[name] = docs.get_or_create_collection(
            name, embedding_function=None, configuration={"hnsw": {"space": "cosine"}})

    def fill_payroll():
        vectors = random.Random(1)  # always the same: payroll is there to be refused, not to be searched
        collections["payroll"].upsert(
            ids=list(PAYROLL), documents=list(PAYROLL.values()),
            embeddings=[[vectors.uniform(-1, 1) for _ in range(DIMENSIONS)] for _ in PAYROLL])

    for name in "handbook", "payroll":
        attempt("docs", "Admin", name, "allow", "create the collection", lambda: create(name))
        if name in collections:
            emit(collection=name, id=str(collections[name].id))
    attempt("docs", "Write", "payroll", "allow", "write three records", fill_payroll)
    return attempt.surprises > 0


if __name__ == "__main__":
    sys.exit(main())
