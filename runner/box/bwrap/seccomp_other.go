//go:build !amd64

package bwrap

// archForbidden are calls that only some machines have: here none.
var archForbidden []uint32
