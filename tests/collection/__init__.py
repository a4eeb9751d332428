"""Which files a collection is made of, what is taken of them, and the manifests that remember it."""
