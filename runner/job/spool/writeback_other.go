//go:build !linux

package spool

import "os"

// writeBack does nothing where the kernel cannot be asked.
func writeBack(*os.File, int64, int64) {}

// linked says that nothing is shared: only a Linux runner does.
func linked(*os.File) bool { return false }
