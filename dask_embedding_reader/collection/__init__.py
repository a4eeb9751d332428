"""What a collection is: which files, what each of them holds, and which rows of them form a piece.

From a listing and headers to a manifest and a plan; manifests saved and opened again.
"""
