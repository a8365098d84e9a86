"""From sources of text to micro-batches: read, tokenise once, index, order, pack."""
