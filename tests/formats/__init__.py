"""Files and the vectors and metadata in them: what each format must do, bit for bit, and how few bytes it reads."""
