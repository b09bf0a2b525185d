"""The S3 store: AWS and every server that speaks its language (Ceph, MinIO, R2 ...)."""
