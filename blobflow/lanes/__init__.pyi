from blobflow.transport.lanes import (
    DownloadTicket as DownloadTicket,
    LaneResult as LaneResult,
    UploadTicket as UploadTicket,
    begin_download as begin_download,
    begin_upload as begin_upload,
    commit_upload as commit_upload,
    fetch_lane as fetch_lane,
    send_parts as send_parts,
)
