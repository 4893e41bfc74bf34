package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rai-project/raid/sshd/blob/blobtest"
)

// cmdS3 is an S3 server with one bucket.
func (w *world) cmdS3(ts *testscript.TestScript, args []string) {
	if len(args) != 1 || w.s3 == nil && args[0] != "start" {
		ts.Fatalf("usage: s3 start | objects | age | tamper | refuse | hang | work")
	}
	switch args[0] {
	case "start":
		w.startS3(ts)
	case "refuse":
		w.s3.Refuse()
	case "hang":
		w.s3.Hang()
	case "work":
		w.s3.Work()
	case "objects":
		fmt.Fprintln(ts.Stdout(), "objects:") // there may be none
		w.eachObject(ts, func(_ context.Context, _ *minio.Client, o minio.ObjectInfo) error {
			_, err := fmt.Fprintln(ts.Stdout(), o.Key)
			return err
		})
	case "age": // two hours
		old := map[string]string{"Raid-Time": time.Now().Add(-2 * time.Hour).UTC().Format(time.RFC3339Nano)}
		w.eachObject(ts, func(ctx context.Context, c *minio.Client, o minio.ObjectInfo) error {
			_, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: w.bucket, Object: o.Key, ReplaceMetadata: true, UserMetadata: old},
				minio.CopySrcOptions{Bucket: w.bucket, Object: o.Key})
			return err
		})
	case "tamper":
		w.eachObject(ts, func(ctx context.Context, c *minio.Client, o minio.ObjectInfo) error {
			_, err := c.PutObject(ctx, w.bucket, o.Key, strings.NewReader(strings.Repeat("x", int(o.Size))), o.Size, minio.PutObjectOptions{})
			return err
		})
	default:
		ts.Fatalf("s3: no %s", args[0])
	}
}

func (w *world) startS3(ts *testscript.TestScript) {
	dir := filepath.Join(w.dir, "s3")
	ts.Check(os.Mkdir(dir, 0o700))
	s, err := blobtest.NewServer(dir)
	ts.Check(err)
	w.s3 = s
	w.within(ts, "make a bucket", func(ctx context.Context) (err error) {
		w.bucket, err = s.NewBucket(ctx)
		return err
	})
	ts.Setenv("S3", s.URL(w.bucket))
	ts.Setenv("S3_BARE", "s3://"+w.bucket+"/some/part?style=path&endpoint=http://"+s.Addr)
	ts.Setenv("S3_KEY", s.Access)
	ts.Setenv("S3_SECRET", s.Secret)
}

// eachObject calls fn with all blobs of the bucket.
func (w *world) eachObject(ts *testscript.TestScript, fn func(context.Context, *minio.Client, minio.ObjectInfo) error) {
	c, err := w.s3.Client()
	ts.Check(err)
	w.within(ts, "s3", func(ctx context.Context) error {
		for o := range c.ListObjectsIter(ctx, w.bucket, minio.ListObjectsOptions{Recursive: true}) {
			if o.Err != nil {
				return o.Err
			}
			if !strings.Contains(o.Key, "sha256/") {
				continue
			}
			if err := fn(ctx, c, o); err != nil {
				return err
			}
		}
		return nil
	})
}

// cmdGet asks for a URL, "-" for the one that the last command printed, and has the status
// looked at. The answer is in http.body and http.header.
func (w *world) cmdGet(ts *testscript.TestScript, args []string) {
	if len(args) < 2 || len(args) > 3 {
		ts.Fatalf("usage: get STATUS URL|- [RANGE]")
	}
	if args[1] == "-" {
		args[1] = strings.TrimSpace(ts.ReadFile("stdout"))
	}
	w.within(ts, "get", func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, args[1], nil)
		if err != nil {
			return err
		}
		if len(args) > 2 {
			req.Header.Set("Range", args[2])
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			return err
		}
		if strconv.Itoa(res.StatusCode) != args[0] {
			return fmt.Errorf("%s is %s, want %s", args[1], res.Status, args[0])
		}
		ts.Check(os.WriteFile(filepath.Join(w.dir, "http.body"), body, 0o644))
		return os.WriteFile(filepath.Join(w.dir, "http.header"), []byte(fmt.Sprintln(res.Header)), 0o644)
	})
}
