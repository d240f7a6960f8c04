"""The embedded quickstart task: its grammar, tokenizer, gold reward and report."""
