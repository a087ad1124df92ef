"""indexer writes the project's documentation into the collection `handbook`. It may write there, and have text turned
into vectors; it may not read what it wrote and may not ask the model. `indexer.py probe` tries what it may not do.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from attempts import Attempts, emit
from gateway import Gateway

MODEL = "smollm2"
BATCH = 8  # sections per request
SECTION = 400  # characters of a section that are kept: the model that reads them is small and slow
LEAD = 64  # characters that are turned into a vector, heading included


def sections(root):
    """Yields (id, title, text) for each section of the documentation below root."""
    for path in [*sorted(root.glob("*.md")), *sorted(root.glob("docs/*.md"))]:
        markdown = re.sub(r"^```.*?^```\n", "", path.read_text(), flags=re.M | re.S)  # prose only
        for number, section in enumerate(re.split(r"^#+ ", markdown, flags=re.M)[1:]):
            title, _, text = section.partition("\n")
            text = " ".join(text.split())
            if len(text) > 40:
                yield f"{path.relative_to(root)}#{number}", title.strip(), text[:SECTION]


def index(gateway, attempt, root, cache):
    chat, docs = gateway.chat(), gateway.docs()
    handbook = None
    vectors = json.loads(cache.read_text()) if cache and cache.exists() else {}
    found = list(sections(root))
    for at in range(0, len(found), BATCH):
        ids, titles, texts = zip(*found[at:at + BATCH])
        leads = [f"{title}: {text}"[:LEAD] for title, text in zip(titles, texts)]
        new = [lead for lead in leads if lead not in vectors]

        def embed():
            answer = chat.embeddings.create(model=MODEL, input=new)
            vectors.update(zip(new, ([round(x, 6) for x in item.embedding] for item in answer.data)))
            return answer.usage.prompt_tokens

        def write():
            nonlocal handbook
            handbook = handbook or docs.get_collection("handbook", embedding_function=None)
            handbook.upsert(ids=list(ids), embeddings=[vectors[lead] for lead in leads], documents=list(texts),
                            metadatas=[{"title": title} for title in titles])

        if new:
            attempt("chat", "Embed", MODEL, "allow", f"turn {len(new)} sections into vectors", embed)
        attempt("docs", "Write", "handbook", "allow", f"write {len(ids)} sections", write)
    if cache:
        cache.write_text(json.dumps(vectors))
    emit(collection="handbook", indexed=len(found))


def probe(gateway, attempt):
    chat, docs = gateway.chat(), gateway.docs()
    attempt("chat", "Infer", MODEL, "deny", "ask the model", lambda: chat.chat.completions.create(
        model=MODEL, max_tokens=4, messages=[{"role": "user", "content": "Hello"}]).usage.total_tokens)

    def read():
        docs.get_collection("handbook", embedding_function=None).get(limit=1)
    attempt("docs", "Read", "handbook", "deny", "read back what it wrote", read)


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("mode", nargs="?", choices=["index", "probe"], default="index")
    args.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="the checkout to index")
    args.add_argument("--cache", type=Path, help="file that keeps vectors, so that only changed text is embedded again")
    args = args.parse_args()
    gateway = Gateway("indexer")
    attempt = Attempts(gateway)
    if args.mode == "index":
        index(gateway, attempt, args.root, args.cache)
    else:
        probe(gateway, attempt)
    return attempt.surprises > 0


if __name__ == "__main__":
    sys.exit(main())
