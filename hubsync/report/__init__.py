"""A run as one page: `gather` and `records` read, `figures` draws, `page` writes."""
