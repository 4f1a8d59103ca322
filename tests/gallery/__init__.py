"""Training loops as strangers write them: right, wrong, and right but wired otherwise."""
