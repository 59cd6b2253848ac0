"""What `ccmdist doctor` looks at, one module per area. Each check yields findings; none of them imports torch here."""
