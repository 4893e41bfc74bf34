package main

import (
	"io"
	"os"
	"path/filepath"

	"github.com/minio/minio-go/v7"

	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/blob/blobtest"
)

// benchS3 moves 256 MiB to an S3 server on this machine and back, as raid does it and as
// its library does by itself: raid also writes what comes to its disk, hashes it, and
// checks what it reads.
func benchS3(b *bench) {
	const size = 256 << 20
	dir := filepath.Join(b.dir, "s3")
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	check(os.Mkdir(dir, 0o700))
	s, err := blobtest.NewServer(dir)
	check(err)
	defer s.Close()
	bucket, err := s.NewBucket(b.Context())
	check(err)
	plain, err := s.Client()
	check(err)
	store, err := blob.OpenBucket(filepath.Join(b.dir, "s3-uploads"), blob.BucketOptions{URL: s.URL(bucket)})
	check(err)
	var key blob.Key
	push := func(f *os.File) float64 {
		defer f.Close()
		return timed(func() {
			u, err := store.Create(0)
			check(err)
			_, err = io.Copy(u, io.NewSectionReader(f, 0, size))
			check(err)
			key, err = u.Commit(b.Context())
			check(err)
		})
	}
	ours := contestant{"raid", func() float64 { return push(b.freshBlob()) }}
	again := contestant{"again", func() float64 {
		f, err := os.Open(b.blob)
		check(err)
		return push(f)
	}}
	theirs := contestant{"minio-go", func() float64 {
		f := b.freshBlob()
		defer f.Close()
		return timed(func() {
			_, err := plain.PutObject(b.Context(), bucket, "plain", io.NewSectionReader(f, 0, size), size, minio.PutObjectOptions{PartSize: 16 << 20})
			check(err)
		})
	}}
	put := b.race(3, ours, again, theirs)
	b.versus("256 MiB to S3: to the local disk, hashed, sent", put["raid"], put["minio-go"], "minio-go, a file", 0)
	b.versus("the same again", put["again"], put["minio-go"], "minio-go, a file", 0)
	get := b.race(3, contestant{"raid", func() float64 {
		return timed(func() { check(store.Verify(b.Context(), key)) })
	}}, contestant{"minio-go", func() float64 {
		return timed(func() {
			o, err := plain.GetObject(b.Context(), bucket, "plain", minio.GetObjectOptions{})
			check(err)
			defer o.Close()
			_, err = io.Copy(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{o})
			check(err)
		})
	}})
	b.versus("256 MiB from S3, checked", get["raid"], get["minio-go"], "minio-go", 0)
	r := b.startRaid(b.T, "s3", "[blobs]\nurl = \""+s.URL(bucket+"/raid")+"\"\n")
	echo := func(r *raid) func() float64 {
		return func() float64 { return timed(func() { b.do(r.server, fast, nil, "submit -- echo hello") }) }
	}
	jobs := b.race(10, contestant{"s3", echo(r)}, contestant{"folder", echo(b.raids["main"])})
	b.versus("submit → exit of echo, output and /build on S3 before the end", jobs["s3"], jobs["folder"], "blobs in a folder", 0)
}
