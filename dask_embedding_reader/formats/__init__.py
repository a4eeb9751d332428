"""How vectors and metadata columns lie in files.

``base`` says what a format must offer; each format is a module or a folder here.
"""
