package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/minio/minio-go/v7"
)

// ExamineBucket tells whether a bucket would do, and where it is, without changing
// anything: it is not tried whether we may write. The errors are those of a Bucket.
func ExamineBucket(ctx context.Context, o BucketOptions) (where string, err error) {
	at, err := parseURL(o.URL)
	if err != nil {
		return "", err
	}
	b := &Bucket{BucketOptions: o, at: at}
	if b.client, err = at.client(at.endpoint, 5*time.Second); err != nil {
		return "", err
	}
	where = fmt.Sprintf("%s/%s at %s", at.bucket, at.prefix, at.endpoint)
	for o := range b.client.ListObjectsIter(ctx, at.bucket, minio.ListObjectsOptions{Prefix: at.prefix, MaxKeys: 1}) {
		if o.Err != nil {
			return where, b.classify(ctx, "list", o.Err)
		}
		break
	}
	if err := b.checkOwner(ctx); !errors.Is(err, ErrNotFound) {
		return where, err
	}
	return where, nil
}

// ownerName is the object that says whose all beside it is.
const ownerName = "raid-owner"

// checkOwner returns ErrForeign for a bucket that is another's, ErrNotFound for one that
// is nobody's.
func (b *Bucket) checkOwner(ctx context.Context) error {
	o, err := b.client.GetObject(ctx, b.at.bucket, b.at.prefix+ownerName, minio.GetObjectOptions{})
	if err != nil {
		return b.classify(ctx, "claim", err)
	}
	defer o.Close()
	owner, err := io.ReadAll(io.LimitReader(o, 1<<10))
	if err != nil {
		return b.classify(ctx, "claim", err)
	}
	if b.Owner != "" && string(owner) != b.Owner {
		return fmt.Errorf("%w: %s/%s%s says %.80q, and we are %q", ErrForeign, b.at.bucket, b.at.prefix, ownerName, owner, b.Owner)
	}
	return nil
}
