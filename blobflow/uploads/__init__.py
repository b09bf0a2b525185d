"""What every multipart upload shares: its intent in the bucket, and its progress."""
