package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
)

const (
	// partSize is what one request uploads; larger blobs come in several. The file is read
	// as it is sent, so none of it is in memory.
	partSize = 16 << 20
	maxParts = 9_000   // S3 takes 10,000: of blobs beyond 140 GiB the parts are larger
	copyMost = 5 << 30 // what S3 copies in one request

	small = time.Minute // how long a request without content may take, tries and all
	stale = 24 * time.Hour
)

// metaTime is the metadata that says when a blob was last committed, by our clock. S3
// knows only when it was last written, by its own.
const metaTime = "Raid-Time"

// A Bucket is a Store in S3, or in what speaks its language. Uploads come to a folder on
// this machine first, as Store says, and from there in one go: S3's writes are atomic.
//
// Blobs lie under sha256/ab/cdef…, as in a Folder, so that each can be copied to the
// other with any tool. A blob that is there is not sent again.
//
// All of a bucket, or of its part under a prefix, belongs to the raids of one
// deployment, as Tidy makes sure, and only one of them at a time may remove by age.
type Bucket struct {
	disk
	BucketOptions
	at     *address
	client *minio.Client
	links  *minio.Client // signs what others will ask for, perhaps of another name

	mu     sync.Mutex // guards the following
	locks  map[Key]*keyLock
	rotten map[Key]bool // blobs that were read and had other bytes
	tidied bool         // since we began
}

// BucketOptions are a bucket's, beside those of the folder that uploads come to. Only
// URL is required.
type BucketOptions struct {
	Options
	// URL is s3://[KEY:SECRET@]BUCKET[/PREFIX][?PARAMETER=…]; the README has the
	// parameters. Without KEY the credentials are those of the environment, AWS_ACCESS_KEY_ID
	// and its kin, of ~/.aws/credentials, or of the machine, if that is Amazon's.
	URL string
	// Owner names the deployment. Tidy refuses a bucket that is another's. "": nobody asks.
	Owner string
	// Alone says that no other process uploads to this bucket now, so that what is half
	// uploaded when we begin will never end.
	Alone bool
	// Stall is how long the network may be silent within a request. Defaults to 1 minute.
	Stall time.Duration
}

// OpenBucket opens a bucket, with dir, made 0700 if need be, for uploads on their way. It
// speaks to nobody yet, so that raid can start while S3 is away. What a process that is
// gone was uploading is removed from dir, so no other may be using it.
func OpenBucket(dir string, o BucketOptions) (*Bucket, error) {
	if o.Stall == 0 {
		o.Stall = time.Minute
	}
	at, err := parseURL(o.URL)
	if err != nil {
		return nil, err
	}
	d, err := newDisk(dir, o.Options)
	if err != nil {
		return nil, fmt.Errorf("open blobs: %w", err)
	}
	d.passing = true
	b := &Bucket{disk: d, BucketOptions: o, at: at, locks: map[Key]*keyLock{}, rotten: map[Key]bool{}}
	if err := errors.Join(os.MkdirAll(b.tmp(), 0o700), os.Chmod(b.dir, 0o700)); err != nil {
		return nil, fmt.Errorf("open blobs: %w", err)
	}
	if err := b.sweep(); err != nil {
		return nil, fmt.Errorf("open blobs: %w", err)
	}
	if b.client, err = at.client(at.endpoint, o.Stall); err != nil {
		return nil, err
	}
	b.links, err = at.client(at.public, o.Stall)
	return b, err
}

// name returns what k's object is called. It checks k: a key may have come a long way.
func (b *Bucket) name(k Key) (string, error) {
	if _, err := ParseKey(string(k)); err != nil {
		return "", fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return b.at.prefix + "sha256/" + k.Hex()[:2] + "/" + k.Hex()[2:], nil
}

// Create is as Store says.
func (b *Bucket) Create(limit int64) (*Upload, error) { return b.create(b, limit) }

// Adopt is as Store says.
func (b *Bucket) Adopt(ctx context.Context, path string, limit int64) (Key, int64, error) {
	return adopt(ctx, b, path, limit)
}

// own returns where k is, with nobody else of this process at it until unlock.
func (b *Bucket) own(ctx context.Context, k Key) (name string, unlock func(), err error) {
	if name, err = b.name(k); err != nil {
		return "", nil, err
	}
	unlock, err = b.lock(ctx, k)
	return name, unlock, err
}

// place uploads file, unless its bytes are there: then they only become young. Two who
// bring the same at once take turns, and the second finds what the first brought.
func (b *Bucket) place(ctx context.Context, file *os.File, k Key, size int64) error {
	name, unlock, err := b.own(ctx, k)
	if err != nil {
		return err
	}
	defer unlock()
	info, err := b.Stat(ctx, k)
	switch {
	case err == nil && info.Size == size && !b.isRotten(k):
		err = b.touch(ctx, name, size)
	case err == nil, errors.Is(err, ErrNotFound):
		err = b.put(ctx, name, io.NewSectionReader(file, 0, size), size)
	}
	if err != nil {
		return err
	}
	b.setRotten(k, false)
	return os.Remove(file.Name())
}

// put uploads an object. When it returns, the object is durable: S3 says so.
func (b *Bucket) put(ctx context.Context, name string, r *io.SectionReader, size int64) error {
	parts := uint64(partSize)
	for int64(parts)*maxParts < size {
		parts *= 2
	}
	_, err := b.client.PutObject(ctx, b.at.bucket, name, r, size, minio.PutObjectOptions{
		ContentType: "application/octet-stream", PartSize: parts, UserMetadata: now()})
	return b.classify(ctx, "upload", err)
}

// touch makes an object young, by copying it to itself where it is: that is how S3 changes
// metadata.
func (b *Bucket) touch(ctx context.Context, name string, size int64) error {
	to := minio.CopyDestOptions{Bucket: b.at.bucket, Object: name, ReplaceMetadata: true, UserMetadata: now()}
	from := minio.CopySrcOptions{Bucket: b.at.bucket, Object: name}
	if size <= copyMost {
		_, err := b.client.CopyObject(ctx, to, from)
		return b.classify(ctx, "renew", err)
	}
	_, err := b.client.ComposeObject(ctx, to, from)
	return b.classify(ctx, "renew", err)
}

func now() map[string]string {
	return map[string]string{metaTime: time.Now().UTC().Format(time.RFC3339Nano)}
}

// Open is as Store says.
func (b *Bucket) Open(ctx context.Context, k Key) (File, error) {
	name, err := b.name(k)
	if err != nil {
		return nil, err
	}
	o := &object{ctx: ctx, b: b, name: name}
	if err := o.request(0); err != nil {
		return nil, describe(k, err)
	}
	f := check(k, o, o.size)
	f.corrupt = func() { b.setRotten(k, true) }
	return f, nil
}

// Stat is as Store says.
func (b *Bucket) Stat(ctx context.Context, k Key) (Info, error) {
	name, err := b.name(k)
	if err != nil {
		return Info{}, err
	}
	limit, cancel := context.WithTimeout(ctx, small)
	defer cancel()
	o, err := b.client.StatObject(limit, b.at.bucket, name, minio.StatObjectOptions{})
	if err != nil {
		return Info{}, describe(k, b.classify(ctx, "look at", err))
	}
	return Info{k, o.Size, timeOf(&o)}, nil
}

// timeOf returns when an object was last committed: as its metadata says, or, for one
// that came there by other ways, when it was written.
func timeOf(o *minio.ObjectInfo) time.Time {
	if t, err := time.Parse(time.RFC3339Nano, o.UserMetadata[metaTime]); err == nil {
		return t
	}
	return o.LastModified
}

// Verify is as Store says.
func (b *Bucket) Verify(ctx context.Context, k Key) error { return verify(ctx, b, k) }

// Remove is as Store says.
func (b *Bucket) Remove(ctx context.Context, k Key) error {
	name, err := b.name(k)
	if err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(ctx, small)
	defer cancel()
	err = b.classify(ctx, "remove", b.client.RemoveObject(limit, b.at.bucket, name, minio.RemoveObjectOptions{}))
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return describe(k, err)
}

// RemoveBefore is as Store says.
func (b *Bucket) RemoveBefore(ctx context.Context, k Key, t time.Time) (bool, error) {
	unlock, err := b.lock(ctx, k)
	if err != nil {
		return false, err
	}
	defer unlock()
	info, err := b.Stat(ctx, k)
	if errors.Is(err, ErrNotFound) || err == nil && !info.Time.Before(t) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, b.Remove(ctx, k)
}

// Renew is as Store says.
func (b *Bucket) Renew(ctx context.Context, k Key) error {
	name, unlock, err := b.own(ctx, k)
	if err != nil {
		return err
	}
	defer unlock()
	info, err := b.Stat(ctx, k)
	if err != nil {
		return err
	}
	return describe(k, b.touch(ctx, name, info.Size))
}

// List is as Store says.
func (b *Bucket) List(ctx context.Context) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		from := b.at.prefix + "sha256/"
		for o := range b.client.ListObjectsIter(ctx, b.at.bucket, minio.ListObjectsOptions{Prefix: from, Recursive: true}) {
			if o.Err != nil {
				yield(Info{}, fmt.Errorf("list blobs: %w", b.classify(ctx, "list", o.Err)))
				return
			}
			fan, rest, _ := strings.Cut(strings.TrimPrefix(o.Key, from), "/")
			k, err := ParseKey(keyPrefix + fan + rest)
			if name, _ := b.name(k); err != nil || name != o.Key {
				continue // not ours
			}
			if !yield(Info{k, o.Size, o.LastModified}, nil) {
				return
			}
		}
	}
}

// ErrForeign is returned by Tidy for a bucket, or a prefix of it, that is another
// deployment's. Each would take the blobs of the other for rubbish.
var ErrForeign = errors.New("blob: this place in the bucket belongs to another raid")

// Tidy makes sure that the bucket is ours and ends uploads that nobody will: those of a
// day ago, and when we begin alone, all.
func (b *Bucket) Tidy(ctx context.Context) error {
	if err := b.Claim(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	all := b.Alone && !b.tidied
	b.tidied = true
	b.mu.Unlock()
	err := b.abortOld(ctx, all)
	if err != nil {
		b.mu.Lock()
		b.tidied = false
		b.mu.Unlock()
	}
	return err
}

// Claim makes the bucket ours if it is nobody's, or returns ErrForeign.
func (b *Bucket) Claim(ctx context.Context) error {
	if b.Owner == "" {
		return nil
	}
	limit, cancel := context.WithTimeout(ctx, small)
	defer cancel()
	err := b.checkOwner(limit)
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	opt := minio.PutObjectOptions{ContentType: "text/plain"}
	opt.SetMatchETagExcept("*") // where that is understood, only one of two who come at once gets it
	err = b.putOwner(limit, opt)
	if minio.ToErrorResponse(err).Code == "NotImplemented" {
		err = b.putOwner(limit, minio.PutObjectOptions{ContentType: "text/plain"})
	}
	if err != nil && minio.ToErrorResponse(err).Code != "PreconditionFailed" {
		return b.classify(ctx, "claim", err)
	}
	return b.checkOwner(limit)
}

func (b *Bucket) putOwner(ctx context.Context, opt minio.PutObjectOptions) error {
	_, err := b.client.PutObject(ctx, b.at.bucket, b.at.prefix+ownerName, strings.NewReader(b.Owner), int64(len(b.Owner)), opt)
	return err
}

// abortOld ends uploads that were begun a day ago, or all.
func (b *Bucket) abortOld(ctx context.Context, all bool) error {
	core := minio.Core{Client: b.client}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the listing
	for u := range b.client.ListIncompleteUploads(ctx, b.at.bucket, b.at.prefix+"sha256/", true) {
		if u.Err != nil {
			return b.classify(ctx, "list uploads", u.Err)
		}
		if !all && time.Since(u.Initiated) < stale {
			continue
		}
		err := core.AbortMultipartUpload(ctx, b.at.bucket, u.Key, u.UploadID)
		if err := b.classify(ctx, "abort an upload", err); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		b.o.Logf("removed the unfinished upload of %s, begun %s", u.Key, u.Initiated.Format(time.RFC3339))
	}
	return nil
}

// Link is as Store says. Whoever asks for it gets a whole blob or any part of it.
func (b *Bucket) Link(ctx context.Context, k Key, name string, expiry time.Time) (string, error) {
	object, err := b.name(k)
	if err != nil {
		return "", err
	}
	if _, err := b.Stat(ctx, k); err != nil {
		return "", err
	}
	u, err := b.links.PresignedGetObject(ctx, b.at.bucket, object, time.Until(expiry).Round(time.Second), url.Values{
		"response-content-disposition": {fmt.Sprintf("attachment; filename=%q", filepath.Base(name))},
		"response-content-type":        {"application/octet-stream"}})
	if err != nil {
		return "", describe(k, b.classify(ctx, "sign", err))
	}
	return u.String(), nil
}

// Shared is true.
func (b *Bucket) Shared() bool { return true }

func (b *Bucket) isRotten(k Key) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rotten[k]
}

func (b *Bucket) setRotten(k Key, rotten bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if rotten {
		b.rotten[k] = true
	} else {
		delete(b.rotten, k)
	}
}
