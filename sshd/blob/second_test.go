package blob

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// A 400 that ends its connection costs no request, with a body or without.
func TestSecondTry(t *testing.T) {
	var asked atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			w.Header().Set("Connection", "close")
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		w.Header().Set("ETag", `"e"`)
		w.Header().Set("Last-Modified", "Mon, 02 Jan 2006 15:04:05 GMT")
	}))
	defer s.Close()
	c, err := minio.New(strings.TrimPrefix(s.URL, "http://"), &minio.Options{Creds: credentials.NewStaticV4("k", "s", ""),
		Region: "us-east-1", Transport: secondTry{http.DefaultTransport}, MaxRetries: 3})
	if err != nil {
		t.Fatal(err)
	}
	for name, call := range map[string]func() error{
		"stat": func() error {
			_, err := c.StatObject(t.Context(), "bucket", "o", minio.StatObjectOptions{})
			return err
		},
		"put": func() error {
			_, err := c.PutObject(t.Context(), "bucket", "o", strings.NewReader("x"), 1, minio.PutObjectOptions{})
			return err
		},
	} {
		asked.Store(0)
		if err := call(); err != nil || asked.Load() != 2 {
			t.Errorf("%s = %v after %d requests, want none after 2", name, err, asked.Load())
		}
	}
}
