// Command s3server is an S3 server for tests: versitygw with a folder behind it, which
// checks signatures and keeps to S3's rules. It listens on a socket and lives for as long
// as its stdin is open.
//
//	s3server DIR SOCKET ACCESS SECRET
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/backend/meta"
	"github.com/versity/versitygw/backend/posix"
	"github.com/versity/versitygw/s3api"
	"github.com/versity/versitygw/s3api/middlewares"
)

func main() {
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, "s3server:", err)
		os.Exit(1)
	}
}

func run(dir, socket, access, secret string) error {
	store, err := posix.New(dir, meta.XattrMeta{}, posix.PosixOpts{NewDirPerm: 0o700, Concurrency: 100, CopyObjectThreshold: 5 << 30})
	if err != nil {
		return err
	}
	iam := auth.NewIAMServiceSingle(auth.Account{Access: access, Secret: secret, Role: auth.RoleAdmin})
	root := middlewares.RootUserConfig{Access: access, Secret: secret}
	ready := s3api.WithOnListen(func() { fmt.Println("listening") })
	srv, err := s3api.New(store, root, "us-east-1", iam, nil, nil, nil, nil,
		s3api.WithQuiet(), s3api.WithKeepAlive(), s3api.WithConcurrencyLimiter(1000, 1000), s3api.WithMpMaxParts(10_000), ready)
	if err != nil {
		return err
	}
	go func() {
		io.Copy(io.Discard, os.Stdin) // whoever started us is gone
		os.Exit(0)
	}()
	return srv.ServeMultiPort([]string{socket})
}
