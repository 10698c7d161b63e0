"""The reference backend: what each family means, as plain, slow, readable torch. Always there."""
