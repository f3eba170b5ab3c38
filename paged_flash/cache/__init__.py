"""Where the KV cache lives: the page table (who holds what), the pool (the bytes), shared prefixes."""
