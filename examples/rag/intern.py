"""intern has a valid identity and no grant: whatever it tries is refused, and told so in the API's own way."""
import sys

from attempts import Attempts
from gateway import Gateway


def main():
    gateway = Gateway("intern")
    attempt = Attempts(gateway)
    chat = gateway.chat()

    def models():
        found = [model.id for model in chat.models.list()]
        if found:
            raise AssertionError(f"sees {found}")

    def ask(model):
        return lambda: chat.chat.completions.create(
            model=model, max_tokens=4, messages=[{"role": "user", "content": "Hello"}]).usage.total_tokens

    def ask_streamed():
        for _ in chat.chat.completions.create(
                model="smollm2", max_tokens=4, stream=True, messages=[{"role": "user", "content": "Hello"}]):
            pass

    attempt("chat", "Enter", "*", "deny", "list the models", models)
    attempt("chat", "Infer", "smollm2", "deny", "ask the model", ask("smollm2"))
    attempt("chat", "Infer", "smollm2", "deny", "ask the model, streamed", ask_streamed)
    attempt("chat", "Infer", "smollm2-private", "deny", "ask the private model", ask("smollm2-private"))
    attempt("chat", "Embed", "smollm2", "deny", "turn text into a vector",
            lambda: chat.embeddings.create(model="smollm2", input="Hello").usage.total_tokens)

    def find(name):  # the client's own first requests may be refused as well
        return lambda: gateway.docs().get_collection(name, embedding_function=None)

    attempt("docs", "Read", "handbook", "deny", "find the collection", find("handbook"))
    attempt("docs", "Read", "payroll", "deny", "find the collection", find("payroll"))
    attempt("docs", "Admin", "intern-notes", "deny", "create a collection",
            lambda: gateway.docs().create_collection("intern-notes", embedding_function=None))
    attempt("docs", "Admin", "handbook", "deny", "delete the collection",
            lambda: gateway.docs().delete_collection("handbook"))
    return attempt.surprises > 0


if __name__ == "__main__":
    sys.exit(main())
