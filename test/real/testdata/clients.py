"""Asks for one resource that is granted and one that is not, with an official client: clients.py CLIENT HOST ADDRESS FOLDER

Prints a line for each step. Where a client can't be given a certificate or an address, what it makes of ssl and grpc is replaced.
"""

import socket
import ssl
import sys

client, host, address, folder = sys.argv[1:]
port = int(address.rpartition(":")[2])
url = f"https://{host}:{port}"
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda name, *more, **named: resolve("127.0.0.1" if name in (host, host.encode()) else name, *more, **named)
context = ssl.create_default_context(cafile=f"{folder}/ca.pem")
context.load_cert_chain(f"{folder}/svid.pem", f"{folder}/key.pem")


def content(name):
    with open(f"{folder}/{name}.pem", "rb") as f:
        return f.read()


def try_it(what, step):
    """Prints what a step returns, or the exception and all that it says of why."""
    try:
        print(f"{what}: {step()}", flush=True)
    except Exception as e:
        print(f"{what}: {type(e).__name__} {' '.join(str(e).split())}", flush=True)


def use_anthropic():
    import anthropic

    c = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, http_client=anthropic.DefaultHttpxClient(verify=context))
    message = [{"role": "user", "content": "hi"}]
    for model in ("m", "o"):
        try_it(model, lambda: c.messages.create(model=model, max_tokens=5, messages=message).content[0].text)
    with c.messages.stream(model="m", max_tokens=5, messages=message) as stream:
        try_it("stream m", lambda: "".join(stream.text_stream))
    try_it("count m", lambda: c.messages.count_tokens(model="m", messages=message).input_tokens)
    try_it("list", lambda: [m.id for m in c.models.list()])
    try_it("batch", lambda: c.messages.batches.create(requests=[{"custom_id": "a", "params": {"model": "m", "max_tokens": 1, "messages": message}}]))


def use_genai():
    from google import genai
    from google.genai import types

    c = genai.Client(api_key="unused", http_options=types.HttpOptions(
        base_url=url, client_args={"verify": context}, retry_options=types.HttpRetryOptions(attempts=1)))
    for model in ("m", "o"):
        try_it(model, lambda: c.models.generate_content(model=model, contents="hi").text)
    try_it("stream m", lambda: "".join(part.text for part in c.models.generate_content_stream(model="m", contents="hi")))
    try_it("embed m", lambda: [e.values for e in c.models.embed_content(model="m", contents=["a", "b"]).embeddings])
    try_it("embed o", lambda: c.models.embed_content(model="o", contents=["a"]))
    try_it("list", lambda: [m.name for m in c.models.list()])
    try_it("files", lambda: list(c.files.list()))


def use_qdrant():
    from qdrant_client import QdrantClient, models

    for name, c in {
        "REST": QdrantClient(url=url, verify=context, check_compatibility=False, timeout=10),
        "gRPC": QdrantClient(host="127.0.0.1", grpc_port=port, prefer_grpc=True, https=True, check_compatibility=False, timeout=10, grpc_options={
            "root_certificates": content("ca"), "private_key": content("key"), "certificate_chain": content("svid"),
            "grpc.ssl_target_name_override": host, "grpc.default_authority": host}),
    }.items():
        for collection in ("docs", "secret"):
            try_it(f"{name} {collection}", lambda: [p.id for p in c.query_points(collection, query=[0.1, 0.2], limit=1).points])
        try_it(f"{name} upsert", lambda: c.upsert("docs", points=[models.PointStruct(id=1, vector=[0.1, 0.2])]).status)
        try_it(f"{name} exists", lambda: c.collection_exists("docs"))
        try_it(f"{name} lookup", lambda: c.query_points("docs", query=7, lookup_from=models.LookupLocation(collection="secret")))
        try_it(f"{name} list", lambda: [x.name for x in c.get_collections().collections])


def use_weaviate():
    ssl.create_default_context = lambda *args, **named: context  # for HTTP
    import grpc
    import weaviate
    from weaviate.classes.init import AdditionalConfig, Timeout
    from weaviate.config import GrpcConfig

    channel = grpc.secure_channel
    grpc.secure_channel = lambda target, **named: channel(address, **named)  # it has a resolver of its own
    c = weaviate.connect_to_custom(
        host, port, True, host, port + 1, True, skip_init_checks=True,  # it wants two ports
        additional_config=AdditionalConfig(timeout=Timeout(init=10, query=10, insert=10), grpc_config=GrpcConfig(
            credentials=grpc.ssl_channel_credentials(content("ca"), content("key"), content("svid")),
            channel_options=[("grpc.ssl_target_name_override", host)])))
    with c:
        for collection in ("Docs", "Secret"):
            x = c.collections.use(collection)
            try_it(f"search {collection}", lambda: [str(o.uuid) for o in x.query.near_vector([0.1], limit=1).objects])
            try_it(f"exists {collection}", x.exists)
            try_it(f"get {collection}", lambda: x.data.exists("6a4f1bd4-7b0a-4f44-9b6d-3a5e7b0a4f44"))
            try_it(f"insert {collection}", lambda: x.data.insert({"a": 1}, uuid="6a4f1bd4-7b0a-4f44-9b6d-3a5e7b0a4f44"))
            try_it(f"insert many {collection}", lambda: x.data.insert_many([{"a": 1}]).has_errors)
        try_it("list", lambda: sorted(c.collections.list_all()))
        try_it("GraphQL", lambda: c.graphql_raw_query("{Get{Docs{a}}}"))


def use_milvus():
    from pymilvus import MilvusClient

    c = MilvusClient(uri=f"https://127.0.0.1:{port}", client_pem_path=f"{folder}/svid.pem", client_key_path=f"{folder}/key.pem",
                     ca_pem_path=f"{folder}/ca.pem", server_name=host, timeout=10)
    for collection in ("docs", "secret"):
        try_it(f"create {collection}", lambda: c.create_collection(collection, dimension=2))
        try_it(f"insert {collection}", lambda: c.insert(collection, [{"id": 1, "vector": [0.1, 0.2]}])["insert_count"])
        try_it(f"search {collection}", lambda: [hit["id"] for hit in c.search(collection, data=[[0.1, 0.2]], limit=1)[0]])
    try_it("list", lambda: c.list_collections())
    for collection in ("docs", "secret"):
        try_it(f"drop {collection}", lambda: c.drop_collection(collection))


{"anthropic": use_anthropic, "google-genai": use_genai, "qdrant-client": use_qdrant, "weaviate-client": use_weaviate, "pymilvus": use_milvus}[client]()
