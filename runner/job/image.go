package job

import (
	"cmp"
	"fmt"
	"path"
	"strings"
)

// Images are the images that a runner takes in one of its pools. nil takes every name,
// for a runner without images ignores them.
type Images struct {
	Default string              `json:"default,omitempty"` // of jobs that name none
	Allow   []string            `json:"allow,omitempty"`   // globs, see ImageAllowed
	Roles   map[string][]string `json:"roles,omitempty"`   // more globs, for people of a role
	Table   string              `json:"table,omitempty"`   // of raid.toml that holds Allow; "" is [box]
}

// Take reports whether a job that names this image, or none, can be run for somebody of
// a role.
func (i *Images) Take(image, role string) bool {
	if i == nil {
		return true
	}
	if image == "" || image == i.Default {
		return i.Default != ""
	}
	return ImageAllowed(image, i.Allow) || ImageAllowed(image, i.Roles[role])
}

// Of returns the image that a job runs in which names this one, or none.
func (i *Images) Of(image string) string {
	if i == nil {
		return image
	}
	return cmp.Or(image, i.Default)
}

// NotAllowed is what people read about an image that is not taken: what staff would
// change.
func (i *Images) NotAllowed(image string) string {
	table := "[box]"
	if i != nil && i.Table != "" {
		table = i.Table
	}
	if image == "" {
		return fmt.Sprintf("the build file names no image and there is no default: give one under rai: image:, or have staff set %s image in raid.toml", table)
	}
	return fmt.Sprintf("the image %q is not allowed here; staff would add it to raid.toml: %s allow = [%q]", image, table, image)
}

// AnyImage is the glob that fits every image.
const AnyImage = "**"

// ImageAllowed reports whether a build file may name an image: one of the globs fits
// it, as in path.Match, so that * stays within one part of a name: "nvidia/cuda:*"
// allows every tag, "rai/*" every image of rai. A name without a tag means :latest.
func ImageAllowed(image string, globs []string) bool {
	if image == "" {
		return false
	}
	full := image
	if last := image[strings.LastIndexByte(image, '/')+1:]; !strings.ContainsAny(last, ":@") {
		full += ":latest"
	}
	for _, g := range globs {
		for _, name := range [...]string{image, full} {
			if ok, err := path.Match(g, name); ok && err == nil || g == AnyImage {
				return true
			}
		}
	}
	return false
}
