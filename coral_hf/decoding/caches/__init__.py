"""KV caches of a call: layers, the ragged cache, and what a continued sequence brings."""
