"""Asks a model one question with the official OpenAI client, and knows nothing of Sallyport.

Where it asks is in OPENAI_BASE_URL, which the client reads by itself.
"""
import os
import sys

import openai

client = openai.OpenAI(api_key=os.environ.get("OPENAI_API_KEY", "unused"))  # the client insists on one
try:
    with client.chat.completions.create(
            model=os.environ.get("MODEL", "smollm2"), max_tokens=48, stream=True,
            messages=[{"role": "user", "content": " ".join(sys.argv[1:]) or "What is a grant?"}]) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                print(chunk.choices[0].delta.content, end="", flush=True)
    print()
except openai.APIError as cause:
    sys.exit(f"ask: error: {cause}")
