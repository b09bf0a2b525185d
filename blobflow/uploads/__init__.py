"""What all multipart uploads share: the intent in the bucket, the session, and the progress."""
