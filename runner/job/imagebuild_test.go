package job

import (
	"fmt"
	"strings"
	"testing"
)

func TestRegistryAllowed(t *testing.T) {
	all := []string{"*"}
	for _, tt := range []struct {
		registry string
		globs    []string
		want     bool
	}{
		{"registry.example.edu", nil, false},
		{"registry.example.edu", []string{"registry.example.edu"}, true},
		{"registry.example.edu:5000", []string{"registry.example.edu"}, false}, // another door
		{"registry.example.edu", []string{"*.example.edu"}, true},
		{"registry.example.edu.evil.com", []string{"*.example.edu"}, false},
		{"docker.io", all, true},
		{"127.0.0.1:5000", all, false},
		{"127.0.0.1:5000", []string{"127.0.0.1:5000"}, true},
		{"127.1", all, false},
		{"2130706433", all, false},
		{"0x7f.1", all, false},
		{"127.0.0.1.", all, false},
		{"[::1]:5000", all, false},
		{"169.254.169.254", all, false},
		{"localhost", all, false},
		{"a.localhost:80", all, false},
		{"metadata", all, false},
		{"metadata.google.internal", all, false},
		{"10.0.0.1", []string{"10.0.0.1"}, true},
		{"", all, false},
	} {
		if got := RegistryAllowed(tt.registry, tt.globs); got != tt.want {
			t.Errorf("RegistryAllowed(%q, %q) = %v, want %v", tt.registry, tt.globs, got, tt.want)
		}
	}
}

func TestBuildImageOrder(t *testing.T) {
	push := func(image, registry string) *BuildPush {
		return &BuildPush{Push: true, ImageName: image, Registry: registry}
	}
	for _, tt := range []struct {
		image BuildImage
		want  string // dockerfile and where it is pushed to, or a part of the error
	}{
		{BuildImage{}, "Dockerfile "},
		{BuildImage{Dockerfile: "./docker//Dockerfile.gpu"}, "docker/Dockerfile.gpu "},
		{BuildImage{ImageName: "raiproject/x:amd64", Dockerfile: "a/../b"}, "b "},
		{BuildImage{Dockerfile: "../x"}, "no file of the project"},
		{BuildImage{Dockerfile: "a/../../x"}, "no file of the project"},
		{BuildImage{Dockerfile: "/etc/passwd"}, "no file of the project"},
		{BuildImage{Dockerfile: "."}, "no file of the project"},
		{BuildImage{Dockerfile: "a\nb"}, "no file of the project"},
		{BuildImage{ImageName: "Bad Name"}, "no name of an image"},
		{BuildImage{ImageName: "x", Push: &BuildPush{Registry: "nonsense here"}}, "Dockerfile "}, // push: false
		{BuildImage{ImageName: "a/b:1", Push: push("", "registry.example.edu")}, "Dockerfile registry.example.edu/a/b:1"},
		{BuildImage{ImageName: "a/b:1", Push: push("c", "https://registry.example.edu/")}, "Dockerfile registry.example.edu/c"},
		{BuildImage{Push: push("reg.example.edu:5000/a", "")}, "Dockerfile reg.example.edu:5000/a"},
		{BuildImage{Push: push("reg.example.edu/a", "reg.example.edu")}, "Dockerfile reg.example.edu/a"},
		{BuildImage{Push: push("reg.example.edu/a", "docker.io")}, "and image_name names"},
		{BuildImage{Push: push("", "docker.io")}, "image_name is missing"},
		{BuildImage{ImageName: "a/b", Push: push("", "")}, "registry is missing"},
		{BuildImage{ImageName: "a/b", Push: push("", "user@host")}, "no host"},
		{BuildImage{ImageName: "a/b", Push: push("", "host/path")}, "no host"},
		{BuildImage{Push: push("a@sha256:1", "docker.io")}, "no name of an image"},
	} {
		got, b, err := "", (*ImageBuild)(nil), error(nil)
		if b, err = tt.image.Order(); err != nil {
			got = err.Error()
		} else if got = b.Dockerfile + " "; b.Push != nil {
			got += b.Push.Ref()
		}
		if err == nil && got != tt.want || !strings.Contains(got, tt.want) {
			t.Errorf("%+v orders %q, want %q", tt.image, got, tt.want)
		}
	}
}

func TestParsePush(t *testing.T) {
	for _, tt := range []struct {
		text, registry string
		c              Credentials
		ok             bool
	}{
		{"docker.io ada secret", "docker.io", Credentials{"ada", "secret"}, true},
		{"127.0.0.1:5000 ada two words ", "127.0.0.1:5000", Credentials{"ada", "two words "}, true},
		{"docker.io ada age:YWdl", "docker.io", Credentials{"ada", "age:YWdl"}, true},
		{"", "", Credentials{}, false},
		{"docker.io", "docker.io", Credentials{}, false},
		{"docker.io ada", "docker.io", Credentials{Username: "ada"}, false},
		{"docker.io ada ", "docker.io", Credentials{Username: "ada"}, false},
		{" ada secret", "", Credentials{"ada", "secret"}, false},
	} {
		registry, c, ok := ParsePush(tt.text)
		if registry != tt.registry || c != tt.c || ok != tt.ok {
			t.Errorf("ParsePush(%q) = %q, %s with %q, %v", tt.text, registry, c, c.Password, ok)
		}
		if ok && FormatPush(registry, c) != tt.text {
			t.Errorf("FormatPush does not give back %q", tt.text)
		}
	}
	if s := fmt.Sprintf("%v %+v %#v", Credentials{"ada", "secret"}, &Credentials{"ada", "secret"}, Credentials{"ada", "secret"}); strings.Contains(s, "secret") {
		t.Errorf("a password was printed: %s", s)
	}
}

func FuzzParsePush(f *testing.F) {
	f.Add("docker.io ada two words")
	f.Fuzz(func(t *testing.T, text string) {
		registry, c, ok := ParsePush(text)
		if ok && (FormatPush(registry, c) != text || registry == "" || c.Username == "" || c.Password == "") {
			t.Errorf("ParsePush(%q) = %q, %q, %q", text, registry, c.Username, c.Password)
		}
	})
}
