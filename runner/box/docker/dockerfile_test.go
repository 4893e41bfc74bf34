package docker

import (
	"errors"
	"strings"
	"testing"

	dockerimage "github.com/docker/docker/api/types/image"

	"github.com/rai-project/raid/runner/box"
)

func TestReadDockerfile(t *testing.T) {
	for _, tt := range []struct {
		text   string
		images string // that it begins with
		lines  string // what the engine gets, less our labels
	}{
		{"FROM a", "a", "FROM a"},
		{"\ufeff# syntax=docker/dockerfile:1\r\nfrom A:1 as b\r\nRUN x", "A:1", "FROM A:1 AS b|RUN x"},
		{"FROM scratch\nCOPY a /", "", "FROM scratch|COPY a /"},
		{"FROM a AS one\nFROM ONE\nFROM b:2@sha256:1", "a b:2@sha256:1", "FROM a AS one|FROM ONE|FROM b:2@sha256:1"},
		{"ARG V=12\nARG I=\"cuda:${V}\"\nFROM nvidia/$I\nARG V", "nvidia/cuda:12", "ARG V=12|ARG I=\"cuda:${V}\"|FROM nvidia/cuda:12|ARG V"},
		{"ARG V\nFROM a:${V:-7}", "a:7", "ARG V|FROM a:7"},
		{"FROM a\nRUN one \\\n  # no\n\n  && two\\\n three", "a", "FROM a|RUN one   && two three"},
		{"FROM a\nRUN x \\", "a", "FROM a|RUN x"},
		{"FROM a AS s\nFROM b\nCOPY --from=s /x /\nCOPY --from=0 /x /\nCOPY --from=c:1 --chown=1 /x /", "a b c:1", ""},
		{"FROM --platform=$BUILDPLATFORM a", "a", "FROM a"},
		{"FROM a\nONBUILD COPY --from=x /y /", "a x", ""},
		{"FROM a\nLABEL raid.runner=x", "a", "FROM a|LABEL raid.runner=x"},
	} {
		f, err := readDockerfile([]byte(tt.text), "k=v")
		if err != nil {
			t.Errorf("readDockerfile(%q): %v", tt.text, err)
			continue
		}
		var lines []string
		for _, l := range f.lines {
			if !l.ours {
				lines = append(lines, l.text)
			}
		}
		if got := strings.Join(f.images, " "); got != tt.images {
			t.Errorf("readDockerfile(%q) needs %q, want %q", tt.text, got, tt.images)
		}
		if got := strings.Join(lines, "|"); tt.lines != "" && got != tt.lines {
			t.Errorf("readDockerfile(%q) = %q, want %q", tt.text, got, tt.lines)
		}
	}
}

// Our label stands wherever a container could run without it.
func TestLabels(t *testing.T) {
	f, err := readDockerfile([]byte("FROM a\nLABEL x=y\nRUN z"), "k=v")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := f.render(nil), "FROM a\nLABEL k=v\nLABEL x=y\nLABEL k=v\nRUN z\n"; got != want {
		t.Errorf("the engine gets %q, want %q", got, want)
	}
}

// The engine is given ids, but for what a stage's name hides.
func TestRender(t *testing.T) {
	f, err := readDockerfile([]byte("FROM a:1 AS b\nFROM c AS c\nFROM c\nCOPY --from=b x y\nCOPY --from=d x y\nRUN a:1 c"), "k=v")
	if err != nil {
		t.Fatal(err)
	}
	want := "FROM sha256:1 AS b\nLABEL k=v\nFROM sha256:2 AS c\nLABEL k=v\nFROM c\nLABEL k=v\nCOPY --from=b x y\nCOPY --from=sha256:3 x y\nRUN a:1 c\n"
	if got := f.render(map[string]string{"a:1": "sha256:1", "c": "sha256:2", "d": "sha256:3"}); got != want {
		t.Errorf("the engine gets %q, want %q", got, want)
	}
}

func TestRefusedDockerfiles(t *testing.T) {
	for _, tt := range []struct {
		text    string
		refused bool // for what it wants, not for how it is written
		says    string
	}{
		{"", false, "no FROM"},
		{"# FROM a", false, "no FROM"},
		{"RUN x\nFROM a", false, "before the first FROM"},
		{"FROM", false, "looks like"},
		{"FROM a b c d", false, "looks like"},
		{"FROM a\nRUNN x", false, "line 2"},
		{"FROM a\nRUN cat <<E\nx\nE", false, "no instruction"},
		{"FROM \"a\"", false, "no name of an image"},
		{"FROM $X", true, "cannot be made out"},
		{"ARG X=$(id)\nFROM $X", true, "cannot be made out"},
		{"ARG X='a b'\nFROM $X", true, "cannot be made out"},
		{"FROM ${X:+y}", true, "cannot be made out"},
		{"FROM deadbeefdead", true, "has to be named"},
		{"FROM sha256:deadbeefdead", true, "has to be named"},
		{"FROM raid-build-x:b1", true, "has to be named"},
		{"FROM --platform=linux/riscv64 a", true, "images are for"},
		{"FROM a\nADD http://169.254.169.254/ /x", true, "ADD"},
		{"FROM a\nADD [\"http\\u003a//x\", \"/\"]", true, "ADD"},
		{"FROM a\nENV U=http://x\nADD $U /", true, "ADD"},
		{"FROM a\nADD ht\\\ntp://x /", true, "ADD"},
		{"FROM a\nONBUILD ADD http://x /", true, "ADD"},
		{"FROM a\nCOPY --fr\"om=x\" / /", true, "quotes"},
		{"FROM a\nCOPY --from=$X / /", true, "quotes"},
		{"FROM a\nONBUILD ONBUILD RUN x", false, "ONBUILD"},
		{"# escape=`\nFROM a", true, "escape"},
		{"FROM a\nRUN a\x00b", false, "control character"},
	} {
		_, err := readDockerfile([]byte(tt.text), "k=v")
		var refused *box.RefusedError
		if err == nil || errors.As(err, &refused) != tt.refused || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("readDockerfile(%q): %v, want %q, refused %v", tt.text, err, tt.says, tt.refused)
		}
	}
}

func TestTriggers(t *testing.T) {
	if err := checkTriggers("x", []string{"COPY . /app", "RUN make"}); err != nil {
		t.Errorf("harmless triggers: %v", err)
	}
	for _, bad := range []string{"ADD http://x /", "COPY --from=y / /"} {
		if checkTriggers("x", []string{bad}) == nil {
			t.Errorf("trigger %q was taken", bad)
		}
	}
}

func TestIgnore(t *testing.T) {
	f := readIgnore([]byte("# no\n*.o\nbuild/\n!build/keep\n**/*.tmp\n/top?\n\\*x\n"))
	for name, want := range map[string]bool{
		"a.o": true, "d/a.o": false, "build": true, "build/x": true, "build/keep": false, "building": false,
		"x.tmp": true, "a/b/x.tmp": true, "topa": true, "top": false, "a/topa": false, "*x": true, "yx": false,
	} {
		if got := f.ignores(name); got != want {
			t.Errorf("ignores(%q) = %v, want %v", name, got, want)
		}
	}
}

// Whatever the file, what the engine gets reads the same again: one instruction a line,
// no image that was not noticed.
func FuzzReadDockerfile(f *testing.F) {
	f.Add("ARG A=b\nFROM ${A} AS x\nCOPY --from=x \\\n a b\nONBUILD ADD c d\nLABEL e=f")
	f.Add("# escape=\\\nFROM a\\\n\\\nb\nRUN # x \\\n#y\nz\\ ")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := readDockerfile([]byte(text), "k=v")
		if err != nil {
			return
		}
		if n := strings.Count(d.render(nil), "\n"); n != len(d.lines) {
			t.Fatalf("%d instructions in %d lines", len(d.lines), n)
		}
		for i, l := range d.lines {
			whole, next := logicalLine(append([]string{l.text}, "RUN next"), 0)
			if whole != strings.TrimSpace(l.text) || next != 1 {
				t.Fatalf("line %d reads %q, then %q", i, l.text, whole)
			}
			word, rest := cutWord(l.text)
			if name, _, _ := strings.Cut(rest, " "); word == "FROM" && strings.ContainsAny(name, "$\"'\\") {
				t.Fatalf("line %d: %q", i, l.text)
			}
		}
	})
}

func TestBorrowed(t *testing.T) {
	for _, tt := range []struct {
		name          string
		tags, digests []string
		want          bool
	}{
		{"r.x/a:1", []string{"r.x/a:1"}, nil, false},
		{"r.x/a:1", []string{"raid-build-x:i1", "r.x/a:1"}, nil, true},
		{"r.x/a:1", []string{"raid-build-x:i1", "r.x/a:1"}, []string{"r.x/a@sha256:1"}, false}, // it is there
		{"r.x/a:1", []string{"raid-build-x:i1", "r.x/a:1"}, []string{"r.x/ab@sha256:1"}, true},
		{"raid-build-x:i1", []string{"raid-build-x:i1", "r.x/a:1"}, nil, false},
		{"sha256:1", []string{"raid-build-x:i1"}, nil, false},
	} {
		if got := borrowed(tt.name, tt.tags, tt.digests); got != tt.want {
			t.Errorf("borrowed(%q, %q, %q) = %v, want %v", tt.name, tt.tags, tt.digests, got, tt.want)
		}
	}
}

// What is removed of a build's images, and what is left because it is somebody's.
func TestLayers(t *testing.T) {
	e := &Engine{cfg: Config{ID: "X"}}
	mine := map[string]string{labelRunner: "X", labelBox: "i1"}
	for _, tt := range []struct {
		name string
		all  []dockerimage.Summary
		want string // in that order
	}{
		{"from top to bottom", []dockerimage.Summary{{ID: "base", RepoTags: []string{"b:1"}}, {ID: "1", ParentID: "base", Labels: mine},
			{ID: "2", ParentID: "1", Labels: map[string]string{labelRunner: "Y", labelBox: "z"}}, {ID: "3", ParentID: "2", RepoTags: []string{"raid-build-x:i1"}}}, "raid-build-x:i1/i1 2/i1 1/i1"},
		{"others", []dockerimage.Summary{{ID: "1", Labels: map[string]string{labelRunner: "Y", labelBox: "i1"}}, {ID: "2", RepoTags: []string{"raid-build-xy:i1"}}}, ""},
		{"pulled, with our label", []dockerimage.Summary{{ID: "1", Labels: mine, RepoTags: []string{"r.x/a:1"}}}, ""},
		{"about to be pushed", []dockerimage.Summary{{ID: "1", Labels: mine, RepoTags: []string{"raid-build-x:i1", "r.x/a:1"}}}, "r.x/a:1/i1 raid-build-x:i1/i1"},
		{"pushed and pulled", []dockerimage.Summary{{ID: "0", Labels: mine}, {ID: "1", ParentID: "0", RepoTags: []string{"raid-build-x:i1", "r.x/a:1"}, RepoDigests: []string{"r.x/a@sha256:1"}}}, "raid-build-x:i1/i1"},
	} {
		var got []string
		for _, l := range e.layers(tt.all) {
			got = append(got, l.ref+"/"+l.owner)
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%s: removes %q, want %q", tt.name, s, tt.want)
		}
	}
}
