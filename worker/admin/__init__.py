"""What operators and payment webhooks change: accounts, credits, dead letters, partitions."""
