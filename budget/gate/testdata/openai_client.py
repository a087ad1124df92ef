# Asks once, with a grant, as an application would, and says what came of it. The SDK tries again when it thinks fit.
import sys

import openai

url, grant = sys.argv[1:]
client = openai.OpenAI(base_url=url + "/usage/7", api_key="none",
                       default_headers={"x-grant": grant, "x-caller": "spiffe://example.org/sdk", "x-max": "300"})
try:
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
    print("answered")
except openai.RateLimitError as e:
    print(e.code, e.message)
