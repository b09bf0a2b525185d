// cheap_s3 [--bucket NAME] [--warm BYTES] [--limit BYTES] [--tls PEM]: an S3 look-alike that costs less than any client,
// so that clients are what a benchmark measures. It prints its URL, serves on a free loopback port and ends when its
// standard input closes. With --tls (a file with certificate and key; compiled with -DTLS) it prints a second URL, https.
//
// It believes everything: no signatures, no checksums are verified. It honours what protocols are built on:
// conditional PUT and Complete, multipart uploads with paged ListParts, ranges pinned by If-Match, listings, and one
// ETag per stored version. Bytes lie in one memfd, in blocks that are recycled: every upload finds its memory already
// mapped, whatever its part size, and a GET is a sendfile.
//
// Control, under a name that no bucket can have (none of it is counted):
//   GET /-/stats                counters since the last reset, as JSON
//   GET /-/reset                counters to zero
//   GET /-/gate?at=N            stop moving body bytes once N were moved since the reset; N=0 lets everything go on
//   GET /-/holds?bucket=&prefix=   {"objects", "bytes", "uploads"} below a prefix
//   GET /-/drop?bucket=&prefix=    forget them
#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#ifdef TLS
#include <openssl/ssl.h>
#endif

using std::string;
using std::string_view;

// ---------------------------------------------------------------------------------------------------------- counters

static std::atomic<long> bytes_in{0}, bytes_out{0}, requests{0}, connections{0}, open_connections{0};

static std::mutex kinds_lock;
static std::map<string, long> kinds;  // requests by S3 operation

static void count(const char* kind) {
    std::lock_guard guard(kinds_lock);
    kinds[kind]++;
}

// Stops all bodies at one point, so that "killed at half" means the same for every client.
class Gate {
public:
    void set(long at) {
        {
            std::lock_guard guard(lock_);
            at_ = at;
        }
        changed_.notify_all();
    }
    bool reached() const { return at_ > 0 && bytes_in + bytes_out >= at_; }
    void pass() {
        if (!reached()) return;
        std::unique_lock guard(lock_);
        changed_.wait(guard, [this] { return !reached(); });
    }

private:
    std::atomic<long> at_{0};
    std::mutex lock_;
    std::condition_variable changed_;
};
static Gate gate;

// ------------------------------------------------------------------------------------------------------------ memory

constexpr size_t BLOCK = 1 << 20;
constexpr size_t SMALL = 64 << 10;  // smaller bodies live on the heap

class Arena {
public:
    void begin(size_t warm, size_t limit) {
        limit_ = limit / BLOCK;
        fd_ = memfd_create("objects", MFD_CLOEXEC);
        const size_t span = std::max<size_t>(limit_, 1) * BLOCK;
        if (fd_ < 0 || ftruncate(fd_, off_t(span)) != 0) throw std::runtime_error("memfd");
        void* mapped = mmap(nullptr, span, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
        if (mapped == MAP_FAILED) throw std::runtime_error("mmap");
        base_ = static_cast<char*>(mapped);
        warm = std::min(warm / BLOCK, limit_) * BLOCK;
        for (size_t at = 0; at < warm; at += 4096) base_[at] = 1;
        // Handed out from the back: in order, so that neighbours stay neighbours.
        for (size_t block = warm / BLOCK; block-- > 0;) free_.push_back(uint32_t(block));
        fresh_ = uint32_t(warm / BLOCK);
    }
    uint32_t take() {
        std::lock_guard guard(lock_);
        if (!free_.empty()) {
            const uint32_t block = free_.back();
            free_.pop_back();
            return block;
        }
        if (fresh_ >= limit_) {
            fputs("cheap_s3: full; give it a larger --limit\n", stderr);
            _exit(3);
        }
        return fresh_++;
    }
    void give(const std::vector<uint32_t>& blocks) {
        std::lock_guard guard(lock_);
        free_.insert(free_.end(), blocks.rbegin(), blocks.rend());
    }
    char* at(uint32_t block) { return base_ + size_t(block) * BLOCK; }
    int fd() const { return fd_; }

private:
    std::mutex lock_;
    std::vector<uint32_t> free_;
    uint32_t fresh_ = 0;
    size_t limit_ = 0;
    int fd_ = -1;
    char* base_ = nullptr;
};
static Arena arena;

struct Blob {
    size_t size = 0;
    string small;
    std::vector<uint32_t> blocks;
    Blob() = default;
    Blob(const Blob&) = delete;
    Blob& operator=(const Blob&) = delete;
    ~Blob() { arena.give(blocks); }
};
using BlobRef = std::shared_ptr<const Blob>;

using Headers = std::map<string, string>;

struct Object {
    std::vector<BlobRef> blobs;
    size_t size = 0;
    string e_tag;
    time_t modified = 0;
    Headers headers;  // content-type and x-amz-meta-*
};
using ObjectRef = std::shared_ptr<const Object>;

struct StoredPart {
    BlobRef blob;
    string e_tag;
    string crc32c;
    time_t modified = 0;
};

struct Upload {
    string bucket, key;
    std::map<int, StoredPart> parts;
    Headers headers;
    time_t begun = 0;
};

static std::mutex store_lock;
static std::map<string, std::map<string, ObjectRef>> buckets;
static std::map<string, std::shared_ptr<Upload>> uploads;
static std::atomic<uint64_t> serial{1};

// -------------------------------------------------------------------------------------------------------------- text

static string format_time(time_t t, const char* format) {
    char text[64];
    tm parts{};
    gmtime_r(&t, &parts);
    strftime(text, sizeof text, format, &parts);
    return text;
}
static string iso(time_t t) { return format_time(t, "%Y-%m-%dT%H:%M:%S.000Z"); }
static string http_date(time_t t) { return format_time(t, "%a, %d %b %Y %H:%M:%S GMT"); }

// The suffix keeps clients from taking it for an MD5.
static string new_e_tag(size_t parts = 1) {
    char text[64];
    const uint64_t n = serial++;
    snprintf(text, sizeof text, "\"%016lx%016lx-%zu\"", n * 0x9E3779B97F4A7C15ul, n, parts);
    return text;
}

static string unquote(string_view text, bool plus) {
    string out;
    for (size_t i = 0; i < text.size(); i++) {
        if (text[i] == '%' && i + 2 < text.size()) {
            out += char(strtol(string(text.substr(i + 1, 2)).c_str(), nullptr, 16));
            i += 2;
        } else {
            out += plus && text[i] == '+' ? ' ' : text[i];
        }
    }
    return out;
}

static string quote(string_view text) {
    string out;
    for (const unsigned char c : text) {
        if (isalnum(c) || strchr("-_.~/", c)) {
            out += char(c);
        } else {
            char code[4];
            snprintf(code, sizeof code, "%%%02X", c);
            out += code;
        }
    }
    return out;
}

static string xml(string_view text) {
    string out;
    for (const char c : text) {
        if (c == '&') out += "&amp;";
        else if (c == '<') out += "&lt;";
        else if (c == '>') out += "&gt;";
        else if (c == '"') out += "&quot;";
        else out += c;
    }
    return out;
}

static string unxml(string text) {
    static const std::array<std::pair<const char*, const char*>, 6> codes{
        {{"&quot;", "\""}, {"&#34;", "\""}, {"&#x22;", "\""}, {"&lt;", "<"}, {"&gt;", ">"}, {"&amp;", "&"}}};
    for (const auto& [code, plain] : codes)
        for (size_t at = 0; (at = text.find(code, at)) != string::npos; at += 1) text.replace(at, strlen(code), plain);
    return text;
}

static string tag(const char* name, string_view value) {
    return string("<") + name + ">" + string(value) + "</" + name + ">";
}

// The text of the first <name> in `text` from `at` on; moves `at` behind it, or to npos if there is none.
static string element(const string& text, const char* name, size_t& at) {
    const string opening = string("<") + name + ">", closing = string("</") + name + ">";
    const size_t start = text.find(opening, at);
    const size_t end = start == string::npos ? start : text.find(closing, start);
    if (end == string::npos) {
        at = string::npos;
        return "";
    }
    at = end + closing.size();
    return text.substr(start + opening.size(), end - start - opening.size());
}

static string document(const char* name, const string& body) {
    return string("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<") + name +
           " xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">" + body + "</" + name + ">";
}

static bool same_tag(string_view given, string_view e_tag) {
    return given == e_tag || given == e_tag.substr(1, e_tag.size() - 2);
}

// -------------------------------------------------------------------------------------------------------- connection

struct Gone {};  // the client hung up

#ifdef TLS
static SSL_CTX* tls_context = nullptr;

static bool begin_tls(const char* pem) {
    tls_context = SSL_CTX_new(TLS_server_method());
    SSL_CTX_set_options(tls_context, SSL_OP_ENABLE_KTLS | SSL_OP_IGNORE_UNEXPECTED_EOF);
    return SSL_CTX_use_certificate_file(tls_context, pem, SSL_FILETYPE_PEM) == 1 &&
           SSL_CTX_use_PrivateKey_file(tls_context, pem, SSL_FILETYPE_PEM) == 1;
}
#endif

class Connection {
public:
    Connection(int fd, bool secure) : fd_(fd) {
#ifdef TLS
        if (!secure) return;
        tls_.reset(SSL_new(tls_context));
        SSL_set_fd(tls_.get(), fd);
        if (SSL_accept(tls_.get()) != 1) throw Gone();
#else
        (void)secure;
#endif
    }

    string line() {
        for (;;) {
            if (const void* end = memchr(buffer_.data() + start_, '\n', end_ - start_)) {
                const char* newline = static_cast<const char*>(end);
                string text(buffer_.data() + start_, size_t(newline - buffer_.data()) - start_);
                start_ = size_t(newline - buffer_.data()) + 1;
                if (!text.empty() && text.back() == '\r') text.pop_back();
                return text;
            }
            fill();
        }
    }
    // At most n bytes, at least one.
    size_t read(char* to, size_t n) {
        if (start_ == end_ && n < buffer_.size()) fill();
        if (start_ < end_) {
            n = std::min(n, end_ - start_);
            memcpy(to, buffer_.data() + start_, n);
            start_ += n;
            return n;
        }
        return receive(to, n, MSG_WAITALL);
    }
    void send(string_view text, bool more = false) {
#ifdef TLS
        if (tls_) {
            if (!text.empty() && SSL_write(tls_.get(), text.data(), int(text.size())) <= 0) throw Gone();
            return;
        }
#endif
        while (!text.empty()) {
            const ssize_t sent = ::send(fd_, text.data(), text.size(), MSG_NOSIGNAL | (more ? MSG_MORE : 0));
            if (sent <= 0) throw Gone();
            text.remove_prefix(size_t(sent));
        }
    }
    // Bytes of the arena.
    void send_stored(size_t at, size_t n) {
#ifdef TLS
        if (tls_) return send(string_view(arena.at(0) + at, n));
#endif
        off_t offset = off_t(at);
        while (n > 0) {
            const ssize_t sent = sendfile(fd_, arena.fd(), &offset, n);
            if (sent <= 0) throw Gone();
            n -= size_t(sent);
        }
    }

private:
    void fill() {
        if (start_ == end_) start_ = end_ = 0;
        if (end_ == buffer_.size()) {
            if (start_ == 0) throw Gone();  // a line longer than any sane header
            memmove(buffer_.data(), buffer_.data() + start_, end_ - start_);
            end_ -= start_;
            start_ = 0;
        }
        end_ += receive(buffer_.data() + end_, buffer_.size() - end_, 0);
    }
    size_t receive(char* to, size_t n, int flags) {
#ifdef TLS
        if (tls_) {
            const int got = SSL_read(tls_.get(), to, int(n));
            if (got <= 0) throw Gone();
            return size_t(got);
        }
#endif
        const ssize_t got = recv(fd_, to, n, flags);
        if (got <= 0) throw Gone();
        return size_t(got);
    }

    int fd_;
#ifdef TLS
    struct Free {
        void operator()(SSL* tls) const { SSL_free(tls); }
    };
    std::unique_ptr<SSL, Free> tls_;
#endif
    std::array<char, 64 << 10> buffer_;
    size_t start_ = 0, end_ = 0;
};

struct Request {
    string method, path, bucket, key;
    std::map<string, string> query;
    Headers headers;
    bool has(const char* name) const { return query.count(name) > 0; }
    string arg(const char* name) const {
        const auto found = query.find(name);
        return found == query.end() ? "" : found->second;
    }
    string header(const char* name) const {
        const auto found = headers.find(name);
        return found == headers.end() ? "" : found->second;
    }
    long number(const char* name, long otherwise) const { return has(name) ? atol(arg(name).c_str()) : otherwise; }
};

// A body as it comes out of its framing; read() gives 0 at the end.
struct BodySource {
    virtual ~BodySource() = default;
    virtual size_t read(char* to, size_t n) = 0;
    string line() {
        string text;
        for (char c; read(&c, 1) && c != '\n';)
            if (c != '\r') text += c;
        return text;
    }
};

class Plain : public BodySource {
public:
    Plain(Connection& connection, size_t length) : connection_(connection), left_(length) {}
    size_t read(char* to, size_t n) override {
        if (left_ == 0) return 0;
        const size_t got = connection_.read(to, std::min(n, left_));
        left_ -= got;
        return got;
    }

private:
    Connection& connection_;
    size_t left_;
};

class Whole : public BodySource {  // what follows on the connection, for the outer chunk lines
public:
    explicit Whole(Connection& connection) : connection_(connection) {}
    size_t read(char* to, size_t n) override { return connection_.read(to, n); }

private:
    Connection& connection_;
};

// HTTP's chunks and those of aws-chunked (with signatures behind the size, and trailers) read the same.
class Chunked : public BodySource {
public:
    explicit Chunked(BodySource& inner) : inner_(inner) {}
    size_t read(char* to, size_t n) override {
        if (ended_) return 0;
        if (left_ == 0) {
            if (!first_) inner_.line();
            first_ = false;
            left_ = strtoul(inner_.line().c_str(), nullptr, 16);
            if (left_ == 0) {
                while (!inner_.line().empty()) {
                }
                ended_ = true;
                return 0;
            }
        }
        const size_t got = inner_.read(to, std::min(n, left_));
        left_ -= got;
        return got;
    }

private:
    BodySource& inner_;
    size_t left_ = 0;
    bool first_ = true, ended_ = false;
};

static std::shared_ptr<Blob> read_body(Connection& connection, const Request& request) {
    const bool framed = request.header("transfer-encoding").find("chunked") != string::npos;
    const bool signed_chunks = request.header("x-amz-content-sha256").rfind("STREAMING", 0) == 0 ||
                               request.header("content-encoding").find("aws-chunked") != string::npos;
    Whole whole(connection);
    Plain plain(connection, strtoul(request.header("content-length").c_str(), nullptr, 10));
    Chunked outer(whole);
    BodySource& carrier = framed ? static_cast<BodySource&>(outer) : plain;
    Chunked inner(carrier);
    BodySource& source = signed_chunks ? static_cast<BodySource&>(inner) : carrier;

    auto blob = std::make_shared<Blob>();
    blob->small.resize(SMALL);
    size_t filled = 0;  // of the small string, then of the last block
    for (;;) {
        gate.pass();
        const bool heap = blob->blocks.empty();
        char* to = heap ? blob->small.data() : arena.at(blob->blocks.back());
        const size_t room = (heap ? SMALL : BLOCK) - filled;
        const size_t got = room ? source.read(to + filled, room) : 0;
        if (room && !got) break;
        filled += got;
        blob->size += got;
        bytes_in += long(got);
        if (room > got) continue;
        if (heap) {
            blob->blocks.push_back(arena.take());
            memcpy(arena.at(blob->blocks.back()), blob->small.data(), filled);
            blob->small = string();
        } else if (filled == BLOCK) {
            blob->blocks.push_back(arena.take());
            filled = 0;
        }
    }
    if (blob->blocks.empty()) {
        blob->small.resize(blob->size);
        blob->small.shrink_to_fit();
    } else if (filled == 0) {
        arena.give({blob->blocks.back()});
        blob->blocks.pop_back();
    }
    char rest;  // the end of an outer framing around aws-chunked
    while (&source != &carrier && carrier.read(&rest, 1)) {
    }
    return blob;
}

static string read_text(Connection& connection, const Request& request) {
    const auto blob = read_body(connection, request);
    string text = blob->small;
    size_t left = blob->blocks.empty() ? 0 : blob->size;
    for (const uint32_t block : blob->blocks) {
        text.append(arena.at(block), std::min(left, BLOCK));
        left -= std::min(left, BLOCK);
    }
    return text;
}

// ----------------------------------------------------------------------------------------------------------- answers

static const char* reason(int status) {
    switch (status) {
        case 200: return "OK";
        case 204: return "No Content";
        case 206: return "Partial Content";
        case 304: return "Not Modified";
        case 404: return "Not Found";
        case 412: return "Precondition Failed";
        case 416: return "Range Not Satisfiable";
        case 501: return "Not Implemented";
        default: return "Bad Request";
    }
}

static string head_of(int status, size_t length, const string& extra) {
    return "HTTP/1.1 " + std::to_string(status) + " " + reason(status) + "\r\nServer: cheap_s3\r\nx-amz-request-id: " +
           std::to_string(requests.load()) + "\r\nDate: " + http_date(time(nullptr)) +
           "\r\nContent-Length: " + std::to_string(length) + "\r\n" + extra + "\r\n";
}

static void reply(Connection& connection, int status, const string& body = "", const string& extra = "") {
    const bool typed = body.empty() || extra.find("Content-Type") != string::npos;
    connection.send(head_of(status, body.size(), typed ? extra : "Content-Type: application/xml\r\n" + extra) + body);
}

static void refuse(Connection& connection, int status, const char* code, bool head = false) {
    const string body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error>" + tag("Code", code) +
                        tag("Message", code) + "</Error>";
    if (head) connection.send(head_of(status, 0, ""));
    else reply(connection, status, body);
}

static ObjectRef find_object(const string& bucket, const string& key) {  // store_lock is held
    const auto in = buckets.find(bucket);
    if (in == buckets.end()) return nullptr;
    const auto found = in->second.find(key);
    return found == in->second.end() ? nullptr : found->second;
}

// 0, or the status that a conditional write is refused with. store_lock is held.
static int refused_by_condition(const Request& request) {
    const ObjectRef present = find_object(request.bucket, request.key);
    if (!request.header("if-none-match").empty() && present) return 412;
    if (const string wanted = request.header("if-match"); !wanted.empty()) {
        if (!present) return 404;
        if (!same_tag(wanted, present->e_tag)) return 412;
    }
    return 0;
}

static Headers kept_headers(const Request& request) {
    Headers kept;
    for (const auto& [name, value] : request.headers)
        if (name == "content-type" || name.rfind("x-amz-meta-", 0) == 0) kept[name] = value;
    return kept;
}

// -------------------------------------------------------------------------------------------------------- operations

static void list_objects(Connection& connection, const Request& request) {
    const bool v2 = request.arg("list-type") == "2", coded = request.arg("encoding-type") == "url";
    const string prefix = request.arg("prefix"), delimiter = request.arg("delimiter");
    const long limit = std::clamp(request.number("max-keys", 1000), 0L, 1000L);
    string after = v2 ? (request.has("continuation-token") ? request.arg("continuation-token") : request.arg("start-after"))
                      : request.arg("marker");
    const auto spell = [coded](const string& text) { return coded ? quote(text) : xml(text); };
    string entries, groups, last;
    long found = 0;
    bool truncated = false;
    {
        std::lock_guard guard(store_lock);
        const auto& objects = buckets[request.bucket];
        auto next = after > prefix ? objects.upper_bound(after) : objects.lower_bound(prefix);
        while (next != objects.end() && next->first.rfind(prefix, 0) == 0) {
            if (found >= limit) {
                truncated = true;
                break;
            }
            const size_t cut = delimiter.empty() ? string::npos : next->first.find(delimiter, prefix.size());
            if (cut != string::npos) {
                const string group = next->first.substr(0, cut + delimiter.size());
                if (after.rfind(group, 0) != 0) {
                    groups += tag("CommonPrefixes", tag("Prefix", spell(group)));
                    found++;
                }
                last = group + "\xff";
                next = objects.lower_bound(last);
                continue;
            }
            const Object& object = *next->second;
            entries += tag("Contents", tag("Key", spell(next->first)) + tag("LastModified", iso(object.modified)) +
                                           tag("ETag", xml(object.e_tag)) + tag("Size", std::to_string(object.size)) +
                                           tag("StorageClass", "STANDARD"));
            last = next->first;
            found++;
            ++next;
        }
    }
    string body = tag("Name", request.bucket) + tag("Prefix", spell(prefix)) + tag("MaxKeys", std::to_string(limit)) +
                  tag("IsTruncated", truncated ? "true" : "false");
    if (!delimiter.empty()) body += tag("Delimiter", spell(delimiter));
    if (coded) body += tag("EncodingType", "url");
    if (v2) body += tag("KeyCount", std::to_string(found));
    if (truncated) body += v2 ? tag("NextContinuationToken", xml(last)) : tag("NextMarker", spell(last));
    reply(connection, 200, document("ListBucketResult", body + entries + groups));
}

static void list_uploads(Connection& connection, const Request& request) {
    string entries;
    {
        std::lock_guard guard(store_lock);
        for (const auto& [id, upload] : uploads)
            if (upload->bucket == request.bucket && upload->key.rfind(request.arg("prefix"), 0) == 0)
                entries += tag("Upload", tag("Key", xml(upload->key)) + tag("UploadId", id) +
                                             tag("StorageClass", "STANDARD") + tag("Initiated", iso(upload->begun)));
    }
    reply(connection, 200,
          document("ListMultipartUploadsResult",
                   tag("Bucket", request.bucket) + tag("IsTruncated", "false") + entries));
}

static void delete_objects(Connection& connection, const Request& request) {
    const string body = read_text(connection, request);
    const bool quiet = body.find("<Quiet>true") != string::npos;
    string deleted;
    {
        std::lock_guard guard(store_lock);
        for (size_t at = 0;;) {
            const string key = unxml(element(body, "Key", at));
            if (at == string::npos) break;
            buckets[request.bucket].erase(key);
            if (!quiet) deleted += tag("Deleted", tag("Key", xml(key)));
        }
    }
    reply(connection, 200, document("DeleteResult", deleted));
}

static void handle_bucket(Connection& connection, const Request& request) {
    if (request.method == "PUT") {
        count("CreateBucket");
        read_text(connection, request);
        std::lock_guard guard(store_lock);
        buckets[request.bucket];
        return reply(connection, 200);
    }
    {
        std::lock_guard guard(store_lock);
        if (!buckets.count(request.bucket))
            return refuse(connection, 404, "NoSuchBucket", request.method == "HEAD");
    }
    if (request.method == "POST" && request.has("delete")) return count("DeleteObjects"), delete_objects(connection, request);
    if (request.method == "HEAD")
        return count("HeadBucket"), reply(connection, 200, "", "x-amz-bucket-region: us-east-1\r\n");
    if (request.method != "GET") return refuse(connection, 501, "NotImplemented");
    if (request.has("location")) return count("GetBucketLocation"), reply(connection, 200, document("LocationConstraint", ""));
    if (request.has("versioning"))
        return count("GetBucketVersioning"), reply(connection, 200, document("VersioningConfiguration", ""));
    if (request.has("uploads")) return count("ListMultipartUploads"), list_uploads(connection, request);
    count("ListObjects");
    list_objects(connection, request);
}

static void put_part(Connection& connection, const Request& request) {
    StoredPart part{read_body(connection, request), new_e_tag(), request.header("x-amz-checksum-crc32c"), time(nullptr)};
    string extra = "ETag: " + part.e_tag + "\r\n";
    if (!part.crc32c.empty()) extra += "x-amz-checksum-crc32c: " + part.crc32c + "\r\n";
    {
        std::lock_guard guard(store_lock);
        const auto upload = uploads.find(request.arg("uploadId"));
        if (upload == uploads.end()) return refuse(connection, 404, "NoSuchUpload");
        std::swap(upload->second->parts[int(request.number("partNumber", 0))], part);
    }
    reply(connection, 200, "", extra);
}

static void put_object(Connection& connection, const Request& request) {
    auto object = std::make_shared<Object>();
    object->blobs.push_back(read_body(connection, request));
    object->size = object->blobs[0]->size;
    object->e_tag = new_e_tag();
    object->modified = time(nullptr);
    object->headers = kept_headers(request);
    ObjectRef old;  // its memory is given back outside the lock
    {
        std::lock_guard guard(store_lock);
        const auto bucket = buckets.find(request.bucket);
        if (bucket == buckets.end()) return refuse(connection, 404, "NoSuchBucket");
        if (const int status = refused_by_condition(request))
            return refuse(connection, status, status == 404 ? "NoSuchKey" : "PreconditionFailed");
        old = bucket->second[request.key];
        bucket->second[request.key] = object;
    }
    reply(connection, 200, "", "ETag: " + object->e_tag + "\r\n");
}

static void create_upload(Connection& connection, const Request& request) {
    read_text(connection, request);
    auto upload = std::make_shared<Upload>();
    upload->bucket = request.bucket;
    upload->key = request.key;
    upload->headers = kept_headers(request);
    upload->begun = time(nullptr);
    char id[32];
    snprintf(id, sizeof id, "upload-%016lx", serial++ * 0x9E3779B97F4A7C15ul);
    {
        std::lock_guard guard(store_lock);
        if (!buckets.count(request.bucket)) return refuse(connection, 404, "NoSuchBucket");
        uploads[id] = upload;
    }
    string extra;
    if (const string algorithm = request.header("x-amz-checksum-algorithm"); !algorithm.empty())
        extra = "x-amz-checksum-algorithm: " + algorithm + "\r\n";
    reply(connection, 200,
          document("InitiateMultipartUploadResult",
                   tag("Bucket", request.bucket) + tag("Key", xml(request.key)) + tag("UploadId", id)),
          extra);
}

static void complete_upload(Connection& connection, const Request& request) {
    const string body = read_text(connection, request);
    auto object = std::make_shared<Object>();
    ObjectRef old;
    {
        std::lock_guard guard(store_lock);
        const auto found = uploads.find(request.arg("uploadId"));
        if (found == uploads.end()) return refuse(connection, 404, "NoSuchUpload");
        if (const int status = refused_by_condition(request))
            return refuse(connection, status, status == 404 ? "NoSuchKey" : "PreconditionFailed");
        int last = 0;
        for (size_t at = 0;;) {
            const string part = element(body, "Part", at);
            if (at == string::npos) break;
            size_t inside = 0;
            const int number = atoi(element(part, "PartNumber", inside).c_str());
            inside = 0;
            const string e_tag = unxml(element(part, "ETag", inside));
            const auto stored = found->second->parts.find(number);
            if (stored == found->second->parts.end() || !same_tag(e_tag, stored->second.e_tag))
                return refuse(connection, 400, "InvalidPart");
            if (number <= last) return refuse(connection, 400, "InvalidPartOrder");
            last = number;
            object->blobs.push_back(stored->second.blob);
            object->size += stored->second.blob->size;
        }
        const string expected = request.header("x-amz-mp-object-size");
        if (object->blobs.empty() || (!expected.empty() && strtoul(expected.c_str(), nullptr, 10) != object->size))
            return refuse(connection, 400, "InvalidRequest");
        object->e_tag = new_e_tag(object->blobs.size());
        object->modified = time(nullptr);
        object->headers = found->second->headers;
        old = buckets[request.bucket][request.key];
        buckets[request.bucket][request.key] = object;
        uploads.erase(found);
    }
    reply(connection, 200,
          document("CompleteMultipartUploadResult",
                   tag("Bucket", request.bucket) + tag("Key", xml(request.key)) + tag("ETag", xml(object->e_tag))));
}

static void list_parts(Connection& connection, const Request& request) {
    const long limit = std::clamp(request.number("max-parts", 1000), 1L, 1000L);
    const long marker = request.number("part-number-marker", 0);
    string entries;
    bool truncated = false;
    long found = 0;
    int last = int(marker);
    {
        std::lock_guard guard(store_lock);
        const auto upload = uploads.find(request.arg("uploadId"));
        if (upload == uploads.end()) return refuse(connection, 404, "NoSuchUpload");
        const auto& parts = upload->second->parts;
        for (auto next = parts.upper_bound(int(marker)); next != parts.end(); ++next) {
            if (found++ >= limit) {
                truncated = true;
                break;
            }
            const auto& [number, part] = *next;
            last = number;
            entries += tag("Part", tag("PartNumber", std::to_string(number)) + tag("LastModified", iso(part.modified)) +
                                       tag("ETag", xml(part.e_tag)) + tag("Size", std::to_string(part.blob->size)) +
                                       (part.crc32c.empty() ? "" : tag("ChecksumCRC32C", part.crc32c)));
        }
    }
    reply(connection, 200,
          document("ListPartsResult",
                   tag("Bucket", request.bucket) + tag("Key", xml(request.key)) + tag("UploadId", request.arg("uploadId")) +
                       tag("PartNumberMarker", std::to_string(marker)) + tag("NextPartNumberMarker", std::to_string(last)) +
                       tag("MaxParts", std::to_string(limit)) + tag("IsTruncated", truncated ? "true" : "false") + entries));
}

static void send_bytes(Connection& connection, const Object& object, size_t from, size_t until) {
    size_t start = 0;
    for (const BlobRef& blob : object.blobs) {
        const size_t end = start + blob->size;
        for (size_t at = std::max(from, start); at < std::min(until, end);) {
            const size_t inside = at - start;
            size_t n = std::min(until, end) - at;
            gate.pass();
            if (blob->blocks.empty()) {
                connection.send(string_view(blob->small).substr(inside, n));
            } else {
                n = std::min(n, BLOCK - inside % BLOCK);
                connection.send_stored(blob->blocks[inside / BLOCK] * BLOCK + inside % BLOCK, n);
            }
            bytes_out += long(n);
            at += n;
        }
        start = end;
    }
}

static void get_object(Connection& connection, const Request& request) {
    const bool head = request.method == "HEAD";
    ObjectRef object;
    {
        std::lock_guard guard(store_lock);
        object = find_object(request.bucket, request.key);
    }
    if (!object) return refuse(connection, 404, "NoSuchKey", head);
    if (const string wanted = request.header("if-match"); !wanted.empty() && !same_tag(wanted, object->e_tag))
        return refuse(connection, 412, "PreconditionFailed", head);
    size_t from = 0, until = object->size;
    const string range = request.header("range");
    const bool partial = range.rfind("bytes=", 0) == 0;
    if (partial) {
        const string spec = range.substr(6);
        const size_t dash = spec.find('-');
        if (dash == 0) {
            from = until - std::min(until, size_t(strtoul(spec.c_str() + 1, nullptr, 10)));
        } else {
            from = strtoul(spec.c_str(), nullptr, 10);
            if (dash + 1 < spec.size()) until = std::min(until, size_t(strtoul(spec.c_str() + dash + 1, nullptr, 10)) + 1);
        }
        if (from >= object->size || from >= until) return refuse(connection, 416, "InvalidRange", head);
    }
    string extra = "ETag: " + object->e_tag + "\r\nLast-Modified: " + http_date(object->modified) + "\r\nAccept-Ranges: bytes\r\n";
    if (!object->headers.count("content-type")) extra += "Content-Type: binary/octet-stream\r\n";
    for (const auto& [name, value] : object->headers) extra += name + ": " + value + "\r\n";
    if (partial)
        extra += "Content-Range: bytes " + std::to_string(from) + "-" + std::to_string(until - 1) + "/" +
                 std::to_string(object->size) + "\r\n";
    connection.send(head_of(partial ? 206 : 200, until - from, extra), !head && until > from);
    if (!head) send_bytes(connection, *object, from, until);
}

static void handle_object(Connection& connection, const Request& request) {
    const bool upload = request.has("uploadId");
    if (request.method == "PUT") {
        if (!request.header("x-amz-copy-source").empty()) return refuse(connection, 501, "NotImplemented");
        if (upload) return count("UploadPart"), put_part(connection, request);
        return count("PutObject"), put_object(connection, request);
    }
    if (request.method == "POST") {
        if (request.has("uploads")) return count("CreateMultipartUpload"), create_upload(connection, request);
        if (upload) return count("CompleteMultipartUpload"), complete_upload(connection, request);
        return refuse(connection, 501, "NotImplemented");
    }
    if (request.method == "DELETE") {
        count(upload ? "AbortMultipartUpload" : "DeleteObject");
        ObjectRef old;
        std::shared_ptr<Upload> aborted;
        {
            std::lock_guard guard(store_lock);
            if (upload) {
                const auto found = uploads.find(request.arg("uploadId"));
                if (found == uploads.end()) return refuse(connection, 404, "NoSuchUpload");
                aborted = found->second;
                uploads.erase(found);
            } else if (auto& objects = buckets[request.bucket]; objects.count(request.key)) {
                old = objects[request.key];
                objects.erase(request.key);
            }
        }
        return reply(connection, 204);
    }
    if (request.method == "GET" && upload) return count("ListParts"), list_parts(connection, request);
    if (request.method != "GET" && request.method != "HEAD") return refuse(connection, 501, "NotImplemented");
    count(request.method == "HEAD" ? "HeadObject" : "GetObject");
    get_object(connection, request);
}

// ----------------------------------------------------------------------------------------------------------- control

static string stats() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& t) { return double(t.tv_sec) + double(t.tv_usec) * 1e-6; };
    char cpu[32];
    snprintf(cpu, sizeof cpu, "%.4f", seconds(usage.ru_utime) + seconds(usage.ru_stime));
    string by;
    {
        std::lock_guard guard(kinds_lock);
        for (const auto& [kind, n] : kinds) by += (by.empty() ? "\"" : ", \"") + kind + "\": " + std::to_string(n);
    }
    return "{\"requests\": " + std::to_string(requests) + ", \"bytes_in\": " + std::to_string(bytes_in) +
           ", \"bytes_out\": " + std::to_string(bytes_out) + ", \"connections\": " + std::to_string(connections) +
           ", \"open\": " + std::to_string(open_connections) + ", \"gated\": " + (gate.reached() ? "true" : "false") +
           ", \"server_cpu_s\": " + cpu + ", \"by_operation\": {" + by + "}}";
}

static void handle_control(Connection& connection, const Request& request) {
    const string bucket = request.arg("bucket"), prefix = request.arg("prefix");
    string answer = "{}";
    if (request.path == "/-/stats") {
        answer = stats();
    } else if (request.path == "/-/reset") {
        bytes_in = bytes_out = requests = connections = 0;
        std::lock_guard guard(kinds_lock);
        kinds.clear();
    } else if (request.path == "/-/gate") {
        gate.set(request.number("at", 0));
    } else if (request.path == "/-/holds" || request.path == "/-/drop") {
        const bool drop = request.path == "/-/drop";
        size_t objects = 0, bytes = 0, begun = 0;
        std::lock_guard guard(store_lock);
        auto& held = buckets[bucket];
        for (auto next = held.lower_bound(prefix); next != held.end() && next->first.rfind(prefix, 0) == 0;) {
            objects++;
            bytes += next->second->size;
            next = drop ? held.erase(next) : std::next(next);
        }
        for (auto next = uploads.begin(); next != uploads.end();) {
            const bool match = next->second->bucket == bucket && next->second->key.rfind(prefix, 0) == 0;
            begun += match;
            next = match && drop ? uploads.erase(next) : std::next(next);
        }
        answer = "{\"objects\": " + std::to_string(objects) + ", \"bytes\": " + std::to_string(bytes) +
                 ", \"uploads\": " + std::to_string(begun) + "}";
    } else {
        return refuse(connection, 404, "NoSuchControl");
    }
    reply(connection, 200, answer, "Content-Type: application/json\r\n");
}

// ----------------------------------------------------------------------------------------------------------- serving

static Request read_request(Connection& connection) {
    Request request;
    const string line = connection.line();
    const size_t first = line.find(' '), last = line.rfind(' ');
    if (first == string::npos || last <= first) throw Gone();
    request.method = line.substr(0, first);
    const string target = line.substr(first + 1, last - first - 1);
    const size_t mark = target.find('?');
    request.path = unquote(string_view(target).substr(0, mark), false);
    for (string_view rest = mark == string::npos ? "" : string_view(target).substr(mark + 1); !rest.empty();) {
        const size_t end = rest.find('&');
        const string_view pair = rest.substr(0, end);
        const size_t equals = pair.find('=');
        request.query[unquote(pair.substr(0, equals), true)] =
            equals == string_view::npos ? "" : unquote(pair.substr(equals + 1), true);
        rest = end == string_view::npos ? "" : rest.substr(end + 1);
    }
    for (string field = connection.line(); !field.empty(); field = connection.line()) {
        const size_t colon = field.find(':');
        if (colon == string::npos) continue;
        string name = field.substr(0, colon);
        std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return char(tolower(c)); });
        const size_t value = field.find_first_not_of(" \t", colon + 1);
        request.headers[name] = value == string::npos ? "" : field.substr(value);
    }
    const size_t slash = request.path.find('/', 1);
    request.bucket = request.path.substr(1, slash == string::npos ? slash : slash - 1);
    if (slash != string::npos) request.key = request.path.substr(slash + 1);
    return request;
}

static void serve(int fd, bool secure) {
    int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    bool counted = false;
    try {
        const auto connection = std::make_unique<Connection>(fd, secure);
        for (;;) {
            const Request request = read_request(*connection);
            if (request.path.rfind("/-/", 0) == 0) {
                handle_control(*connection, request);
                continue;
            }
            if (!counted) connections++, open_connections++, counted = true;
            requests++;
            if (!request.header("expect").empty()) connection->send("HTTP/1.1 100 Continue\r\n\r\n");
            if (request.bucket.empty()) count("ListBuckets"), reply(*connection, 200, document("ListAllMyBucketsResult", ""));
            else if (request.key.empty()) handle_bucket(*connection, request);
            else handle_object(*connection, request);
            if (request.header("connection") == "close") break;
        }
    } catch (const Gone&) {
    }
    if (counted) open_connections--;
    close(fd);
}

static int listener(const char* scheme) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    if (bind(fd, reinterpret_cast<sockaddr*>(&address), length) != 0 || listen(fd, 4096) != 0 ||
        getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) {
        perror("cheap_s3");
        _exit(1);
    }
    printf("%s://127.0.0.1:%d\n", scheme, ntohs(address.sin_port));
    return fd;
}

[[noreturn]] static void accept_all(int listening, bool secure) {
    for (;;) {
        const int fd = accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
        if (fd >= 0) std::thread(serve, fd, secure).detach();
    }
}

int main(int argc, char** argv) {
    size_t warm = 0, limit = 16ul << 30;
    const char* pem = nullptr;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--warm")) warm = strtoul(argv[i + 1], nullptr, 10);
        else if (!strcmp(argv[i], "--bucket")) buckets[argv[i + 1]];
        else if (!strcmp(argv[i], "--limit")) limit = strtoul(argv[i + 1], nullptr, 10);
        else if (!strcmp(argv[i], "--tls")) pem = argv[i + 1];
        else return fprintf(stderr, "cheap_s3: unknown option %s\n", argv[i]), 2;
    }
    signal(SIGPIPE, SIG_IGN);
    rlimit files{};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    arena.begin(warm, limit);

    const int plain = listener("http");
    if (pem != nullptr) {
#ifdef TLS
        if (!begin_tls(pem)) return fprintf(stderr, "cheap_s3: no certificate and key in %s\n", pem), 1;
        std::thread(accept_all, listener("https"), true).detach();
#else
        return fputs("cheap_s3: compiled without TLS\n", stderr), 2;
#endif
    }
    fflush(stdout);
    std::thread([] {
        char byte;
        while (::read(STDIN_FILENO, &byte, 1) > 0) {
        }
        _exit(0);
    }).detach();
    accept_all(plain, false);
}
