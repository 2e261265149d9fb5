"""What each command of `jaxgen` does; `cli` says what it takes."""
