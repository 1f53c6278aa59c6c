"""Text to blocks: read sources, give documents to clients, tokenise, pack, cache, mask."""
