"""Changes by operators and payment webhooks: accounts, credits, dead letters, partitions."""
