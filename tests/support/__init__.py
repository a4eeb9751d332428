"""What the tests share: collections with their oracle, servers, planted faults, and programs that are killed."""
