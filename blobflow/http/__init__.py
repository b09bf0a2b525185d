"""HTTP/1.1 clients that know nothing of S3: `client` for large bodies, `async_client` for many small ones."""
