package latest

import (
	"testing"
	"testing/synctest"
)

func TestUnknownUntilSet(t *testing.T) {
	var v Value[[]string]
	if got, known := v.Latest(); known || got != nil {
		t.Fatalf("Latest before Set = %v, %v; want nil, false", got, known)
	}
	v.Set(nil)
	if _, known := v.Latest(); !known {
		t.Fatal("nil is a value: Latest after Set(nil) says unknown")
	}
}

func TestSlowReaderGetsTheNewest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var v Value[int]
		changed := v.Changed()
		seen := make(chan int)
		go func() {
			<-changed
			n, _ := v.Latest()
			seen <- n
		}()
		synctest.Wait()
		select {
		case <-changed:
			t.Fatal("woken before any Set")
		default:
		}
		v.Set(1)
		v.Set(2)
		if n := <-seen; n != 1 && n != 2 {
			t.Fatalf("reader saw %d", n)
		}
		if n, _ := v.Latest(); n != 2 {
			t.Fatalf("Latest = %d, want 2", n)
		}
	})
}

func TestEveryReaderIsWoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var v Value[string]
		const readers = 5
		done := make(chan struct{}, readers)
		for range readers {
			changed := v.Changed()
			go func() {
				<-changed
				done <- struct{}{}
			}()
		}
		synctest.Wait()
		v.Set("x")
		for range readers {
			<-done
		}
	})
}
