"""`make test-hub`: what hubsync assumes of the Hub, measured on the Hub of HF_ENDPOINT (default: the real one)."""
