"""Uses the Workload API of SPIFFE_ENDPOINT_SOCKET as a program would, with the spiffe package, and prints what it got,
one JSON value a line: client.py OUR_TOKEN THEIR_TOKEN BAD_TOKEN

The tokens are for the audience "db": of this trust domain, of other.org, and one that is not valid. When it has printed
"watching" it waits for what is pushed, and prints that too.
"""

import json
import queue
import sys
import warnings

from spiffe import JwtSource, JwtSvid, SpiffeId, TrustDomain, WorkloadApiClient, X509Source

warnings.simplefilter("error", UserWarning)
ours, theirs, bad = sys.argv[1:]
client = WorkloadApiClient(default_timeout=30)


def say(name, value):
    print(json.dumps([name, value]), flush=True)


def x509(bundles):
    return {b.trust_domain.name: len(b.x509_authorities) for b in bundles}


def jwt(bundles):
    return {b.trust_domain.name: sorted(b.jwt_authorities) for b in bundles}


def error(call):
    try:
        call()
    except Exception as e:
        return str(e)
    return "no error"


say("fetch_x509_svid", str(client.fetch_x509_svid().spiffe_id))
say("fetch_x509_svids", [str(s.spiffe_id) for s in client.fetch_x509_svids()])
say("fetch_x509_bundles", x509(client.fetch_x509_bundles().bundles))
say("fetch_x509_context", x509(client.fetch_x509_context().x509_bundle_set.bundles))

svid = client.fetch_jwt_svid({"db"})
say("fetch_jwt_svid", [str(svid.spiffe_id), sorted(svid.audience)])
named = client.fetch_jwt_svid({"db", "cache"}, SpiffeId("spiffe://example.org/db"))
say("fetch_jwt_svid of one", [str(named.spiffe_id), sorted(named.audience)])
say("fetch_jwt_svids", [str(s.spiffe_id) for s in client.fetch_jwt_svids({"db"})])
say("fetch_jwt_svid of another", error(lambda: client.fetch_jwt_svid({"db"}, SpiffeId("spiffe://example.org/other"))))

bundles = client.fetch_jwt_bundles()
say("fetch_jwt_bundles", jwt(bundles.bundles))
for name, token in ("our", ours), ("their", theirs), ("fetched", svid.token):
    valid = client.validate_jwt_svid(token, "db")
    bundle = bundles.get_bundle_for_trust_domain(valid.spiffe_id.trust_domain)
    alone = JwtSvid.parse_and_validate(token, bundle, {"db"})
    say(f"validate_jwt_svid of {name} token", [str(valid.spiffe_id), str(alone.spiffe_id)])
say("validate_jwt_svid of a bad token", error(lambda: client.validate_jwt_svid(bad, "db")))
say("validate_jwt_svid for another", error(lambda: client.validate_jwt_svid(ours, "cache")))

pushed = queue.Queue()
with X509Source(timeout_in_seconds=30) as certificates, JwtSource(timeout_in_seconds=30) as keys:
    say("X509Source", [str(certificates.get_x509_context().default_svid.spiffe_id),
                       x509(certificates.get_x509_context().x509_bundle_set.bundles)])
    say("JwtSource", [str(keys.fetch_svid({"db"}).spiffe_id), jwt(keys.bundles)])
    certificates.subscribe_for_updates(lambda: pushed.put("X509Source"))
    keys.subscribe_for_updates(lambda: pushed.put("JwtSource"))
    say("watching", None)
    for source in sorted([pushed.get(timeout=30), pushed.get(timeout=30)]):
        say(f"{source} was pushed", x509(certificates.get_x509_context().x509_bundle_set.bundles)
            if source == "X509Source" else jwt(keys.bundles))
    token = keys.fetch_svid({"db"}).token
    bundle = keys.get_bundle_for_trust_domain(TrustDomain("example.org"))
    say("JwtSource after it", str(JwtSvid.parse_and_validate(token, bundle, {"db"}).spiffe_id))
