package job

import (
	"strings"
	"testing"
)

func TestImageAllowed(t *testing.T) {
	for _, tt := range []struct {
		image string
		globs []string
		want  bool
	}{
		{"rai/root", nil, false},
		{"rai/root", []string{"rai/*"}, true},
		{"rai/root:amd64-gpu-latest", []string{"rai/*"}, true},
		{"rai/deep/root", []string{"rai/*"}, false}, // * stops at a slash
		{"evil.example/rai/root", []string{"rai/*"}, false},
		{"nvidia/cuda:12.4.1-devel-ubuntu22.04", []string{"other", "nvidia/cuda:12.*"}, true},
		{"nvidia/cuda:11.0", []string{"nvidia/cuda:12.*"}, false},
		{"gcc", []string{"gcc:latest"}, true},
		{"gcc:latest", []string{"gcc"}, false}, // without * a glob means what it says
		{"host:5000/gcc", []string{"host:5000/*"}, true},
		{"gcc@sha256:abc", []string{"gcc"}, false},
		{"gcc", []string{"["}, false},
		{"", []string{"*"}, false},
		{"host:5000/a/b/c:v1", []string{"**"}, true},
		{"", []string{"**"}, false},
	} {
		if got := ImageAllowed(tt.image, tt.globs); got != tt.want {
			t.Errorf("ImageAllowed(%q, %q) = %v, want %v", tt.image, tt.globs, got, tt.want)
		}
	}
}

func TestImagesTake(t *testing.T) {
	for _, tt := range []struct {
		images *Images
		image  string
		role   string
		want   bool
	}{
		{nil, "", "student", true},
		{nil, "any", "student", true},
		{&Images{}, "", "student", false},
		{&Images{}, "any", "student", false},
		{&Images{Default: "rai/root"}, "", "student", true},
		{&Images{Default: "rai/root"}, "rai/root", "student", true},
		{&Images{Default: "rai/root"}, "rai/root:old", "student", false},
		{&Images{Allow: []string{"rai/*"}}, "", "student", false},
		{&Images{Allow: []string{"rai/*"}}, "rai/root", "student", true},
		{&Images{Roles: map[string][]string{"staff": {"own/*"}}}, "own/x", "student", false},
		{&Images{Roles: map[string][]string{"staff": {"own/*"}}}, "own/x", "staff", true},
		{&Images{Roles: map[string][]string{"staff": {"**"}}}, "", "staff", false},
	} {
		if got := tt.images.Take(tt.image, tt.role); got != tt.want {
			t.Errorf("%+v.Take(%q, %q) = %v, want %v", tt.images, tt.image, tt.role, got, tt.want)
		}
	}
}

// The line to add is of the table that decides.
func TestNotAllowed(t *testing.T) {
	for _, tt := range []struct {
		images *Images
		image  string
		want   string
	}{
		{&Images{}, "a/b:1", `[box] allow = ["a/b:1"]`},
		{&Images{Table: "[pools.x]"}, "a/b:1", `[pools.x] allow = ["a/b:1"]`},
		{&Images{}, "", "[box] image"},
		{&Images{Table: "[pools.x]"}, "", "[pools.x] image"},
	} {
		if got := tt.images.NotAllowed(tt.image); !strings.Contains(got, tt.want) {
			t.Errorf("%+v.NotAllowed(%q) = %q, want %q in it", tt.images, tt.image, got, tt.want)
		}
	}
}
