r"""mlx_lm's OpenAI-compatible server with compressed caches: more conversations in the same memory.

    python examples/python/server.py --model smollm2 --port 8080 --prompt-cache-bytes 1000000000

    curl -s http://localhost:8080/v1/chat/completions -H "Content-Type: application/json" \
         -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 40}'

All options of mlx_lm.server work. What it keeps of earlier conversations are packed caches too, so that
--prompt-cache-bytes holds several times as many of them.
"""

import argparse
import sys

from mlx_lm import server

from veloxquant_mlx.cache.base import KVCacheConfig, install
from veloxquant_mlx.models import model_directory


class Provider(server.ModelProvider):
    """Loads models as mlx_lm does, then makes their caches ours."""

    bits = 4

    def load(self, *arguments, **options):
        loaded = super().load(*arguments, **options)
        if "make_cache" not in self.model.__dict__:
            install(self.model, KVCacheConfig(method="rabitq", bits=self.bits))  # needs no calibration
        return loaded


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, a directory, or a hub name")
    parser.add_argument("--bits", type=int, default=4, help="1 to 4, of a key or value element in the cache")
    arguments, others = parser.parse_known_args()
    Provider.bits = arguments.bits
    server.ThreadingHTTPServer.request_queue_size = 64  # Python's default of 5 resets what comes beyond
    server.ModelProvider = Provider
    sys.argv[1:] = ["--model", str(model_directory(arguments.model)), *others]
    server.main()


if __name__ == "__main__":
    main()
