//go:build !linux

package blob

import "os"

// writeBack does nothing where no call begins to write without waiting for the end.
func writeBack(*os.File, int64, int64) error { return nil }

func allocate(*os.File, int64, int64) {}
