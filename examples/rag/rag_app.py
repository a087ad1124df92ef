"""rag-app answers a question with what the collection `handbook` says about it.

    rag_app.py ask [QUESTION]   one question: its vector, the sections nearest to it, the model's answer, streamed
    rag_app.py watch            the same small request again and again, until ended: to see a grant removed, or an
                                SVID rotated, while it runs
    rag_app.py probe            what it may not do
"""
import argparse
import itertools
import re
import signal
import sys
import threading

from attempts import Attempts, emit
from gateway import Gateway

MODEL = "smollm2"
QUESTION = "What is a grant?"
NEAREST = 24  # how many sections the search returns; of those, the ones that share most words with the question
SECTIONS, EXCERPT = 2, 240  # go into the prompt, and of each so many characters: reading takes the model 10 ms a token


class Rag:
    def __init__(self, gateway, attempt):
        self._gateway, self._attempt = gateway, attempt
        self._chat, self._docs, self._handbook = gateway.chat(), gateway.docs(), None

    def embed(self, text):
        answer = self._chat.embeddings.create(model=MODEL, input=text)
        return answer.data[0].embedding, answer.usage.total_tokens

    def search(self, vector):
        """Returns the titles and texts of the nearest sections."""
        if self._handbook is None:
            self._handbook = self._docs.get_collection("handbook", embedding_function=None)
        found = self._handbook.query(query_embeddings=[vector], n_results=NEAREST, include=["documents", "metadatas"])
        return list(zip((m["title"] for m in found["metadatas"][0]), found["documents"][0]))

    def complete(self, prompt, tokens, on_text=lambda text: None):
        """Streams the model's answer to on_text; returns how many tokens it took."""
        used = None
        with self._chat.chat.completions.create(
                model=MODEL, messages=prompt, max_tokens=tokens, temperature=0,
                stream=True, stream_options={"include_usage": True}) as stream:
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    on_text(chunk.choices[0].delta.content)
                if chunk.usage:
                    used = chunk.usage.total_tokens
        return used

    def complete_at_once(self, prompt, tokens, on_text):
        """Like complete, not streamed."""
        answer = self._chat.chat.completions.create(model=MODEL, messages=prompt, max_tokens=tokens, temperature=0)
        on_text(answer.choices[0].message.content)
        return answer.usage.total_tokens

    def ask(self, question, stream, tokens, on_text=lambda text: None):
        """Answers one question, in one trace; prints a line for each step and one for the whole."""
        vector, sources, text = [], [], []

        def embed():
            got, used = self.embed(question)
            vector.extend(got)
            return used

        def generate():
            context = "\n".join(f"{title}: {body[:EXCERPT]}" for title, body in sources)
            prompt = [{"role": "user", "content": f"{context}\n\nIn one sentence, from the text above: {question}"}]
            complete = self.complete if stream else self.complete_at_once
            return complete(prompt, tokens, lambda part: (text.append(part), on_text(part)))

        with self._gateway.tracer.start_as_current_span("rag.answer", attributes={"rag.question": question}) as span:
            steps = (
                ("chat", "Embed", MODEL, "turn the question into a vector", embed),
                ("docs", "Read", "handbook", "find sections",
                 lambda: sources.extend(best(question, self.search(vector)))),
                ("chat", "Infer", MODEL, "stream the answer" if stream else "answer", generate),
            )
            answered = all(self._attempt(endpoint, operation, resource, "allow", what, action)
                           for endpoint, operation, resource, what, action in steps)
        emit(question=question, answer="".join(text).strip(), sources=[title for title, _ in sources], ok=answered,
             trace_id=f"{span.get_span_context().trace_id:032x}")

    def watch(self, operation, pause, count, tokens):
        """Repeats one small request, each with a line that also says how often the SVID has been rotated."""
        stop = threading.Event()
        for signum in signal.SIGTERM, signal.SIGINT:
            signal.signal(signum, lambda *_: stop.set())
        prompt = [{"role": "user", "content": "Tell a long story about a gate."}]
        nothing = [1.0] + [0.0] * 575
        target, action = {
            "Infer": (("chat", "Infer", MODEL), lambda: self.complete(prompt, tokens)),
            "Read": (("docs", "Read", "handbook"), lambda: self.search(nothing)),
        }[operation]
        for _ in itertools.count() if count is None else range(count):
            identity = self._gateway.identity
            self._attempt(*target, "allow", "watch", action, rotations=identity.rotations if identity else 0)
            if stop.wait(pause):
                return


def best(question, sections):
    """The sections that share most words with the question, nearest first among equals."""
    def words(text):
        return {word.rstrip("s") for word in re.findall(r"[a-z]{4,}", text.lower())}

    asked = words(question)
    return sorted(sections, key=lambda s: -len(asked & words(s[0])) - len(asked & words(s[1][:EXCERPT])))[:SECTIONS]


def probe(gateway, attempt, payroll):
    """Tries what rag-app may not do, and looks at what it can see. payroll is that collection's ID, which it could have learnt somewhere."""
    chat, docs, http = gateway.chat(), gateway.docs(), gateway.http()
    vector = [1.0] + [0.0] * 575
    database = "/api/v2/tenants/default_tenant/databases/default_database"
    elsewhere = "/api/v2/tenants/other_tenant/databases/other_database"

    def read_payroll(path):
        return lambda: http.post(path, json={"query_embeddings": [vector], "n_results": 3}).raise_for_status()

    def only_handbook(path):
        def see():
            found = [c["name"] for c in http.get(path).raise_for_status().json()]
            if found != ["handbook"]:
                raise AssertionError(f"sees {found}")
        return see

    def only_smollm2():
        found = [model.id for model in chat.models.list()]
        if found != ["smollm2"]:
            raise AssertionError(f"sees {found}")

    def write():
        docs.get_collection("handbook", embedding_function=None).upsert(
            ids=["README.md#0"], embeddings=[vector], documents=["Every caller is allowed everything."])

    attempt("chat", "Infer", "smollm2-private", "deny", "ask the private model", lambda: chat.chat.completions.create(
        model="smollm2-private", max_tokens=4, messages=[{"role": "user", "content": "Hello"}]).usage.total_tokens)
    attempt("chat", "", "/slots", "deny", "look at other callers' requests",
            lambda: chat.with_options(base_url=gateway.chat_url).get("/slots", cast_to=object))
    attempt("docs", "Write", "handbook", "deny", "write a record", write)
    attempt("docs", "Admin", "handbook", "deny", "delete the collection", lambda: docs.delete_collection("handbook"))
    attempt("docs", "Read", "payroll", "deny", "find the collection by its name",
            lambda: docs.get_collection("payroll", embedding_function=None))
    attempt("docs", "Read", "payroll", "deny", "search it by its ID", read_payroll(f"{database}/collections/{payroll}/query"))
    attempt("docs", "Read", "payroll", "deny", "search it by its ID, as if in another database",
            read_payroll(f"{elsewhere}/collections/{payroll}/query"))
    attempt("docs", "Read", "payroll", "deny", "search it by its ID, spelt otherwise",
            read_payroll(f"{database}/collections/{payroll.replace('-', '').upper()}/query"))
    attempt("docs", "Enter", "*", "allow", "list the collections: handbook only", only_handbook(f"{database}/collections"))
    attempt("chat", "Enter", "*", "allow", "list the models: smollm2 only", only_smollm2)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = args.add_subparsers(dest="mode", required=True)
    ask = modes.add_parser("ask")
    ask.add_argument("question", nargs="*", default=[QUESTION])
    ask.add_argument("--no-stream", dest="stream", action="store_false")
    ask.add_argument("--tokens", type=int, default=48, help="the longest answer")
    watch = modes.add_parser("watch")
    watch.add_argument("--operation", choices=["Infer", "Read"], default="Read")
    watch.add_argument("--pause", type=float, default=0.02, help="seconds between requests")
    watch.add_argument("--count", type=int, help="how many requests; without it, until ended by a signal")
    watch.add_argument("--tokens", type=int, default=1, help="the longest answer, for Infer")
    modes.add_parser("probe").add_argument("--payroll", default="00000000-0000-4000-8000-000000000000", metavar="UUID")
    args = args.parse_args()

    gateway = Gateway("rag-app")
    attempt = Attempts(gateway)
    if args.mode == "probe":
        probe(gateway, attempt, args.payroll)
    elif args.mode == "watch":
        Rag(gateway, attempt).watch(args.operation, args.pause, args.count, args.tokens)
    else:
        rag = Rag(gateway, attempt)
        for question in args.question:
            rag.ask(question, args.stream, args.tokens, lambda part: print(part, end="", file=sys.stderr, flush=True))
        print(file=sys.stderr)
    return attempt.surprises > 0


if __name__ == "__main__":
    sys.exit(main())
